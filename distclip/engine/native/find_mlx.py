"""Print the folder of MLX and the name of the kernel's module, for CMakeLists.txt: ``FOLDER;mlx_0_32_4``.

pip builds in an isolated environment with the newest MLX: the environment that is installed into comes first.
"""

import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path

for paths in ([sysconfig.get_path("platlib")], sys.path):
    spec = PathFinder.find_spec("mlx", paths)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        versions = [mlx.version for mlx in distributions(name="mlx", path=[str(Path(folder).parent)])]
        if versions and (Path(folder) / "include/mlx/version.h").exists():
            print(folder, "mlx_" + re.sub(r"\W", "_", versions[0]), sep=";")
            sys.exit()
sys.exit("no mlx with its C++ headers was found")
