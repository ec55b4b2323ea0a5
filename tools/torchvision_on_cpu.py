"""Let torchvision's CUDA wheel import beside a CPU-only torch.

torchvision registers fake kernels for two operators that its compiled part declares; beside a torch without CUDA that
part does not load, and the import stops at `operator torchvision::nms does not exist`. Declaring both operators first
mends it. This script writes an import hook into the environment it runs in, and only where it is needed: torch without
CUDA, torchvision built with it. Anywhere else it removes the hook if there is one, and does nothing more.
"""
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares torchvision's operators before torchvision is imported (written by brainmets' set-up)."""
import sys


class _DeclareOperators:
    library = None  # must stay alive, or the declarations vanish

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _DeclareOperators.library is None:
            import torch
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DeclareOperators.library = library
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


def imports(module):
    "Whether a fresh interpreter can import `module`."
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def main():
    site = Path(sysconfig.get_paths()["purelib"])
    hook, pth = site/"_brainmets_torchvision.py", site/"_brainmets_torchvision.pth"
    for file in (hook, pth): file.unlink(missing_ok=True)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None: return
    import torch
    if torch.version.cuda is not None or imports("torchvision"): return
    hook.write_text(HOOK)
    pth.write_text("import _brainmets_torchvision\n")
    if not imports("torchvision"):
        for file in (hook, pth): file.unlink(missing_ok=True)
        sys.exit("torchvision does not import beside this torch, and declaring its operators did not help.")


if __name__ == "__main__": main()
