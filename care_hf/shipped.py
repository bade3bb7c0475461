"""Where the settings and scripts lie that come with the package, however it was installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder "configs" or "conversion".

    A wheel has it inside the package, a checkout and whatever is installed from one in place beside the package.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    if inside.is_dir():
        return inside
    # Beside an installed package there may be anybody's "configs".
    if beside.is_dir() and (PACKAGE.parent / "pyproject.toml").is_file():
        return beside
    raise FileNotFoundError(
        f"care_hf was installed without its folder {name!r}: there is neither {inside} nor a checkout around the "
        "package. Install it again, from a wheel or with `pip install -e`."
    )
