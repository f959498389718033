"""The claims of studies in README.md, and their figures: ``python -m benchmarks.studies jbn-study``.

Takes the results of ``jbn study`` into ``docs/studies/``; measures nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks import readme

KEPT = Path(__file__).parents[1] / "docs" / "studies"
FILES = ("results.json", "figure.png")


def table(study: Path) -> str:
    """Return the claims of a study, and what came out for each."""
    claims = json.loads((study / FILES[0]).read_text(encoding="utf-8"))["claims"]
    rows = [[f"{each['claim']} ({each['source']})", each["verdict"], each["sentence"]] for each in claims]
    return readme.markdown(["the claim", "here", "what came out"], rows)


def tables() -> dict[str, str]:
    """Return the tables by the names of their markers."""
    return {f"study-{study.name}": table(study) for study in sorted(KEPT.iterdir()) if study.is_dir()}


def main() -> None:
    """Take in the results of a folder of studies, and write their tables into the pages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="the --out of jbn study")
    for results in sorted(parser.parse_args().folder.glob(f"*/{FILES[0]}")):
        kept = KEPT / results.parent.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(results.with_name(name), kept / name)
    for name, content in tables().items():
        readme.replace(name, content)


if __name__ == "__main__":
    main()
