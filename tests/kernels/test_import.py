"""Our `kernels` package shares its name with an optional package; transformers must not mistake it for that one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_does_not_mistake_our_kernels_for_its_own():
    code = """
import kernels
from transformers.utils import is_kernels_available
import transformers.modeling_utils
from transformers import LlamaForCausalLM
print(is_kernels_available(), kernels.__file__, hasattr(kernels, "__version__"))
"""
    assert _run(code).split() == ["False", str(ROOT / "kernels" / "__init__.py"), "False"]


def test_public_names_load_lazily_and_a_cpu_never_imports_triton():
    code = """
import sys
import kernels
print("torch" in sys.modules)
kernels.ops_for("cpu")
triton = [name for name in sys.modules if name.startswith("kernels.triton")]
print("torch" in sys.modules, "transformers" in sys.modules, bool(triton))
"""
    assert _run(code).split() == ["False", "True", "False", "False"]
