"""What settings.ini says, handed to setuptools; pyproject.toml lists these fields as dynamic."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
need = settings["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): need[key].split()
    for key in need
    if key.endswith("_requirements")
}

setup(
    python_requires=f">={need['min_python']}",
    install_requires=need["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": need["console_scripts"].split(),
        "nbdev": ["ddpm_nb = ddpm_nb._modidx:d"],
    },
)
