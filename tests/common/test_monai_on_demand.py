"""MONAI's packages with their names and without their modules: on a made-up MONAI, and on the real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.code_hash import ROOT

MADE_UP = {
    "__init__.py": """
from .utils.module import load_submodules
__version__ = "1"
load_submodules(None, False)
load_submodules(None, True)
""",
    "utils/__init__.py": "from __future__ import annotations\nfrom .module import load_submodules\n",
    "utils/module.py": "def load_submodules(*_):\n    raise RuntimeError('the walk')\n",
    "nets/__init__.py": """
from .small import Small, Small as Little
from .heavy import Heavy
from .used import used
from .star import *
VALUE = used()
""",
    "nets/small.py": "class Small: pass\n",
    "nets/heavy.py": "raise RuntimeError('heavy')\n",
    "nets/used.py": "def used(): return 7\n",
    "nets/star.py": "star = 8\n",
    "empty/__init__.py": "",
}
BEGIN = (
    "import sys; from common.monai_on_demand import load_monai_on_demand as load; load(); load();"
)


def run(program: str, folder: Path) -> str:
    """What a program prints in a process of its own in which MONAI is loaded on demand."""
    command = (sys.executable, "-c", f"{BEGIN} sys.path.insert(0, {str(folder)!r})\n{program}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_a_package_hands_on_is_loaded_when_it_is_asked_for(tmp_path):
    for name, text in MADE_UP.items():
        path = tmp_path / "monai" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    program = """
import monai, monai.nets, monai.empty
print(monai.__version__, monai.nets.VALUE, monai.nets.star, "monai.nets.small" in sys.modules)
from monai.nets import Little, Small
from monai.nets.small import Small as own
print(Small is Little is own, "Small" in vars(monai.nets), hasattr(monai.nets, "Smal"))
try:
    from monai.nets import Heavy
except RuntimeError as error:
    print(error)
"""
    assert run(program, tmp_path).splitlines() == ["1 7 8 False", "True True False", "heavy"]


def test_packages_are_attributes_and_star_imports_and_dir_see_every_name(tmp_path):
    program = """
import monai
print(monai.losses.DiceLoss.__module__, hasattr(monai, "no_such_package"), hasattr(monai, "__path"))
print({"DiceLoss", "FocalLoss"} <= set(dir(monai.losses)))
from monai.losses import *
print(DiceLoss is monai.losses.DiceLoss, FocalLoss.__module__)
"""
    assert run(program, tmp_path).splitlines() == [
        "monai.losses.dice False False",
        "True",
        "True monai.losses.focal_loss",
    ]


def test_a_network_needs_a_tenth_of_monai_and_none_of_what_it_finds_installed(tmp_path):
    program = """
import common.network
from monai.networks.nets import BasicUNet
unwanted = {"mlflow", "matplotlib", "pydicom", "skimage", "nibabel", "monai.apps.datasets"}
print(BasicUNet.__module__, BasicUNet is sys.modules["monai.networks.nets.basic_unet"].BasicUNet)
print(sum(name.startswith("monai.") for name in sys.modules) < 60, unwanted & set(sys.modules))
"""
    assert run(program, tmp_path).splitlines() == [
        "monai.networks.nets.basic_unet True",
        "True set()",
    ]
