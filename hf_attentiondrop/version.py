"""The package's version, and the oldest versions of what it builds on that its tests have run with."""

from importlib.metadata import version

from packaging.version import Version


__version__ = "0.1.0.dev0"

MINIMUM_VERSIONS = {"torch": "2.11.0", "transformers": "5.16.0"}


def require_minimum_versions() -> None:
    """Refuses dependencies that are too old to work with.

    Raises:
        ImportError: naming the package, the version found and the version needed.
    """
    for package, minimum in MINIMUM_VERSIONS.items():
        found = version(package)
        # A build such as 2.13.0+cpu or a nightly 2.14.0.dev counts as its release.
        if Version(found).release < Version(minimum).release:
            raise ImportError(
                f"hf_attentiondrop needs {package} >= {minimum}, found {found}: its tests have not run with older "
                "releases, which hand masks and arguments to attention functions differently. Upgrade with: "
                f'pip install "{package}>={minimum}"'
            )
