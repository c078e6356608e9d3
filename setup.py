"""Build script: the repository root is the import package ``finebridge``.

``package_dir`` maps the name to the root and the package list is explicit, so that ``./train/sft.py`` *is*
``finebridge.train.sft`` on disk, in the wheel and for a type checker, and nothing else of the checkout (tests,
benchmarks, a user's own folders) can slip into a wheel.
"""

from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGES = [
    "finebridge",
    "finebridge.storage",
    "finebridge.ds_configs",
    "finebridge.data_tools",
    "finebridge.merge",
    "finebridge.bridge",
    "finebridge.bridge.families",
    "finebridge.train",
    "finebridge.finetune",
]


class BuildPackage(build_py):
    """Leaves ``setup.py`` out of the wheel: it lies in the package's folder but is no module of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of ``package`` as (package, module, path), without ``setup``."""
        found: list[Any] = super().find_package_modules(package, package_dir)
        return [row for row in found if not (package == "finebridge" and row[1] == "setup")]


setup(
    packages=PACKAGES,
    package_dir={"finebridge": "."},
    package_data={
        "finebridge": ["py.typed"],
        "finebridge.ds_configs": ["*.json"],
        "finebridge.data_tools": ["*.sh", "chat_templates/*.jinja"],
        "finebridge.merge": ["*.sh"],
        "finebridge.bridge": ["*.sh"],
        "finebridge.train": ["*.sh"],
        "finebridge.finetune": [
            "*.sh",
            "recipes/*.yaml",
            "example_data/*.json",
            "example_data/*.jsonl",
            "example_data/*.jinja",
            "example_data/*.yaml",
        ],
    },
    include_package_data=False,
    cmdclass={"build_py": BuildPackage},
)
