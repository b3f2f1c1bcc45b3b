__version__ = "0.1.0"

from . import solvers  # noqa: E402,F401  its samplers and spacings join the registries of `sample`
