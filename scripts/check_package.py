"""The wheel and the source distribution, built and installed as a user gets them: `make package`.

Each is installed into an empty virtual environment, without its dependencies: those are borrowed from the environment
that runs this program, by a .pth file (its own editable install is not seen that way). Then, in an empty directory:
`import spd_lens` takes the installed files, and every model and decomposition that ships with the package loads and
runs. Cost: about a minute, and no network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, spd_lens
from pathlib import Path
from spd_lens import decompose_layer, pack_tokens
from spd_lens import models
where = Path(spd_lens.__file__).resolve()
assert Path(sys.prefix).resolve() in where.parents, f"imported {where}, not the installed package"
assert (where.parent / "py.typed").is_file()
model = models.load_tiny_lm()
tokens = pack_tokens([models.load_moby_dick("held_out")], model.tokenizer, context=16, max_rows=2)
before = model(tokens)
decomposition = decompose_layer(model, layer=0)
assert torch.equal(model(tokens), before)
assert decomposition.importance(tokens)
induction = models.load_induction_decomposition()
assert induction.importance(models.RepeatedSequences(1).batch(0))
shipped = models.load_tiny_lm(decomposed=True)
assert shipped.importance(tokens)["blocks.0.mlp.W_in"].isfinite().all()
credit = models.load_credit(decomposed=True)
assert credit.importance(models.load_credit_applicants("held_out").tokens[:2])
assert models.load_modular_addition()(torch.tensor([[1, 2, models.P]])).isfinite().all()
print(f"spd_lens {spd_lens.__version__} from {where.parent}: four models, three decompositions, one text, one table")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for built in build(work / "dist"):
            directory = work / built.name
            python = empty_environment(directory / "venv")
            run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
                "--no-build-isolation", "--no-index", built)  # fmt: skip
            print(f"{built.name} ({built.stat().st_size / 1e6:.1f} MB)", flush=True)
            (directory / "elsewhere").mkdir()
            run(python, "-c", CHECK, cwd=directory / "elsewhere")


def build(out: Path) -> list[Path]:
    """The wheel and the source distribution of what git would see: a copy without earlier builds."""
    source = out.parent / "source"
    leave_out = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "site", "demo_output"
    )
    shutil.copytree(ROOT, source, ignore=leave_out)
    run(Path(sys.executable), "-m", "build", "--no-isolation", "--outdir", out, source, quiet=True)
    built = sorted(out.iterdir())
    assert [path.suffix for path in built] == [".whl", ".gz"] or [p.suffix for p in built] == [".gz", ".whl"], built
    return built


def empty_environment(path: Path) -> Path:
    """The Python of a new environment that sees this one's libraries, but not its editable install."""
    venv.create(path, with_pip=True)
    python = path / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = path / "lib" / version / "site-packages" / "borrowed.pth"
    borrowed.write_text(sysconfig.get_paths()["purelib"] + "\n")
    # Some Pythons put an old setuptools into new environments, which would build instead of the borrowed one.
    run(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", quiet=True)
    return python


def run(*command: str | Path, cwd: Path | None = None, quiet: bool = False) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, stdout=subprocess.DEVNULL if quiet else None)


if __name__ == "__main__":
    main()
