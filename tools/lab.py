"""JupyterLab's settings for `make lab`: a saved page is a clean one (nbdev's own hook), so that a diff shows only what changed."""

from nbdev.clean import clean_jupyter

c = get_config()  # noqa: F821
c.FileContentsManager.pre_save_hook = clean_jupyter
c.LabApp.news_url = None  # nothing is asked of the network
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
