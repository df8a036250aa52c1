"""The adapters' packages are optional: pykern imports without them, an adapter says which one it lacks."""

import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_pykern_imports_no_adapter():
    ran = python("import sys, pykern; print([name for name in sys.modules if name.startswith('pykern.integrations')])")
    assert ran.stdout.strip() == "[]", ran.stderr


def test_transformers_adapter_without_transformers():
    # None in sys.modules is how Python marks a module that can't be imported.
    ran = python("import sys; sys.modules['transformers'] = None; import pykern.integrations.transformers")
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pykern.integrations.transformers needs the package transformers"), last
    assert "pip install transformers" in last
