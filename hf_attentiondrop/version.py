"""The version of the package, and the oldest supported versions of its dependencies."""

from importlib.metadata import version

from packaging.version import Version


__version__ = "0.1.0"

MINIMUM_VERSIONS = {"torch": "2.11.0", "transformers": "5.16.0"}


def check_minimum_versions() -> None:
    """Checks that the installed dependencies are not too old.

    Raises:
        ImportError: if one of them is.
    """
    for package, minimum in MINIMUM_VERSIONS.items():
        found = version(package)
        # A build such as 2.13.0+cpu or a nightly 2.14.0.dev counts as its release.
        if Version(found).release < Version(minimum).release:
            raise ImportError(
                f"hf_attentiondrop needs {package} >= {minimum}, found {found}: older releases are untested and pass "
                "masks and arguments to attention functions differently. Upgrade with: "
                f'pip install "{package}>={minimum}"'
            )
