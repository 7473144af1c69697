"""Every Python block of the guide runs, in the order of the page."""

import os
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "lmp_triton" / "README.md"


def test_guide(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "\n".join(blocks)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


def test_what_it_names_is_there():
    """Modules and classes in the text."""
    import lmp_triton
    from lmp_triton.integrations import dropins

    text = GUIDE.read_text()
    for name in lmp_triton.__all__:
        assert re.search(rf"\b{name}\b", text), name
    for name in ("MaxPoolingLoss", "MaxPoolingPixelSampler", "DecodeHeadLoss"):
        assert name in text and hasattr(dropins, name)
    for name in re.findall(r"^\| [^|]* \| `(\w+)` \|", text, re.MULTILINE):
        assert hasattr(dropins, name) or (GUIDE.parent / "examples" / f"{name}.py").exists(), name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text()
    assert len(readme.splitlines()) <= 110
    links = [link for link in re.findall(r"\]\(([^)#]+)", readme) if not link.startswith("http")]
    assert len(links) >= 8 and [link for link in links if not (root / link).exists()] == []


def test_the_price_is_a_goal_wherever_it_stands():
    """No GPU has shown it yet."""
    root, price = GUIDE.parents[1], "price of cross-entropy"
    files = [root / "README.md", *(x for part in ("lmp_triton", "kernels", "perf") for x in (root / part).rglob("*"))]
    texts = [" ".join(x.read_text().split()) for x in files if x.suffix in (".md", ".py")]
    claims = [text[at.start() : at.end() + 20] for text in texts for at in re.finditer(price, text)]
    assert len(claims) >= 2 and all("is the goal" in claim for claim in claims), claims
