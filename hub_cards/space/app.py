"""A Space that finds people again: set the variable PERSONVIT_MODELS to one or more checkpoints, with commas between.

PERSONVIT_GALLERIES names what is searched, in the same way; by default the folder `data` beside this file.
"""

import os
from pathlib import Path

from personvit_hf.app import PersonFinder, launch_app, named_sources

models = os.environ.get("PERSONVIT_MODELS")
if not models:
    raise SystemExit("Set the variable PERSONVIT_MODELS to a checkpoint, such as your-name/person-finder.")
galleries = os.environ.get("PERSONVIT_GALLERIES") or f"demo={Path(__file__).with_name('data')}"
finder = PersonFinder(named_sources(models.split(",")), named_sources(galleries.split(",")))
launch_app(finder, host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
