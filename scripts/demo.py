"""`make demo`: what ``diffusers-sde demo`` does, into outputs/demo of this clone, and the paper's Figure 2."""

import subprocess
import sys
from pathlib import Path

from diffusers_sde.commands.demo import build_parser, run_demo

ROOT = Path(__file__).resolve().parent.parent


def draw_trajectories(output: Path) -> Path:
    """The mixture that is carried from data to prior and back."""
    picture = output / "trajectories.png"
    subprocess.run([sys.executable, str(ROOT / "examples" / "trajectories.py"), "--output", str(picture)], check=True)
    return picture


if __name__ == "__main__":
    arguments = build_parser("demo.py", ROOT / "outputs" / "demo").parse_args()
    run_demo(arguments.output_dir, arguments.steps, draw_trajectories)
