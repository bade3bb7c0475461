"""Record the console in a terminal of 80 columns: ``python benchmarks/console_recordings.py`` renews docs/console.md.

Everything runs on the bundled testbed, in a folder that is removed afterwards; what a terminal shows at the end of each
command is kept, without colours.
"""

import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from terminal import run_in_terminal  # noqa: E402

PROMPTS = (
    "--benign try/benign.jsonl --malicious try/malicious.jsonl --exposed try/exposed.jsonl --neutral try/neutral.jsonl"
)
PAGE, MARK = ROOT / "docs" / "console.md", "<!-- recordings -->"
SCENES = [
    ("Something to try on", "The testbed's model and prompts as files; instead of these, name your own.",
     ["demo --files try"]),
    ("Fit", "Interrupted after some seconds; the same command goes on.",
     [(f"fit try/model {PROMPTS} --out repaired", 12), f"fit try/model {PROMPTS} --out repaired"]),
    ("Look at it", "", ["info repaired"]),
    ("Talk to it", "Base and repaired side by side, and how much the repair changed at each token.",
     ["chat repaired --prompt '{attack}' --image more/attack.png", "chat repaired --prompt '{benign}'"]),
    ("Measure it", "With the control that takes no training; `--quick` is for trying only.",
     ["evaluate repaired --suite testbed --split validation --quick --out results"]),
    ("Add prompts", "As if they had been there from the beginning.",
     ["fit try/model --malicious more/attacks.jsonl --out repaired --update"]),
    ("Tune", "", ["tune --trials 4 --n 2 --family turn --out tuned"]),
    ("Mistakes", "", [
        "fit try/model --benign try/benin.jsonl --malicious try/malicious.jsonl --out other",
        f"fit try/model {PROMPTS} --recipe lava-1.5-7b --out other",
        "merge repaired --out merged",
    ]),
]  # fmt: skip


def record(command, seconds, folder):
    """What the terminal shows of one command; interrupted after `seconds`, if any."""
    arguments = [str(Path(sys.executable).with_name("care")), *shlex.split(command)]
    _, text = run_in_terminal(arguments, folder=folder, interrupt_after=seconds)
    note = f"   # Ctrl+C after {seconds} s" if seconds else ""
    return f"$ care {command}{note}\n{text.strip()}\n"


def main():
    from care_hf.samples import Sample
    from care_hf.testbed.files import write_files
    from care_hf.testbed.world import World

    world = World()
    (attack,), (benign,) = world.attack("typographic", "validation", 1), world.benign("recipe", "validation", 1)
    texts = {"attack": attack.text, "benign": benign.text}
    pages = [PAGE.read_text().partition(MARK)[0] + MARK]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write_files(folder / "more", n=24, families=("icon",))
        attacks = (folder / "more" / "malicious.jsonl").read_text().splitlines(keepends=True)
        (folder / "more" / "attacks.jsonl").write_text("".join(line for line in attacks if '"icon"' in line))
        Sample(attack.messages).images[0].save(folder / "more" / "attack.png")
        for title, told, commands in SCENES:
            shown = []
            for entry in commands:
                command, seconds = entry if isinstance(entry, tuple) else (entry, None)
                shown.append(record(command.format(**texts), seconds, folder))
                print(shown[-1], flush=True)
            pages.append("\n\n".join(part for part in (f"## {title}", told) if part))
            pages.append("```console\n" + "\n".join(shown) + "```")
    PAGE.write_text("\n\n".join(page.strip() for page in pages) + "\n")


if __name__ == "__main__":
    main()
