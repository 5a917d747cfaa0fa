"""torchtune, which writes peft's files and does not read them."""

from __future__ import annotations

from fxlora.checkpoint.readers.base import MERGE, Reader, Rule

TORCHTUNE = Reader(
    "torchtune",
    "torchtune",
    "torchtune 0.6.1",
    (
        Rule(
            "layout",
            "fails",
            "writes files in peft's layout and does not read them: it loads its own adapter_model.pt, with other names and "
            "with the rows of q's and k's B in another order.",
            MERGE,
            "torchtune/training/checkpointing/_checkpointer.py, save_checkpoint; torchtune/models/convert_weights.py",
        ),
    ),
)
