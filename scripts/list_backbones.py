"""Try every causal LM of the installed transformers as a backbone, and write docs/backbones.md.

    python scripts/list_backbones.py            # writes the page
    python scripts/list_backbones.py --check    # fails if the page or `VERIFIED` would change

The script builds every type at tiny size (6 layers, cut at 3) and calls `verify_backbone`. For
types that pass, it also makes a family. Its deepest exit must equal the original model, bit for
bit, in logits and in generated text.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from pages import table, wants_check
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from backbones import UNRUNNABLE, causal_lm_types, tiny_model  # noqa: E402

from hf_familial import FamilialForCausalLM, verify_backbone  # noqa: E402
from hf_familial.models.backbone_verification import VERIFIED  # noqa: E402


PAGE = ROOT / "docs" / "backbones.md"
DEPTH, CUT = 6, 3
HEADER = """# Backbones

This page shows which causal LM types of Transformers can be the backbone of a family. {works} of
the {total} types in Transformers {version} work. To check a model of your own:

```python
from transformers import AutoModelForCausalLM

from hf_familial import verify_backbone

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
report = verify_backbone(model)
print(report.ok, report.continues, report.relays)
```

```text title="Output"
True True True
```

| column | value of the report | if yes |
| --- | --- | --- |
| exits | `ok` | Early exits work, and the deepest exit equals the original model. |
| private layers | `continues` | `num_exit_layers` can be above 0. |
| relay | `relays` | Deeper layers can process pending positions in one pass. |

A family of a type that is not in the table is checked when you create it. If the check fails, the
error names the reason. `python scripts/list_backbones.py` writes this page. It builds every type
with {depth} layers, cuts it at {cut}, and compares numbers.

"""


@dataclass(frozen=True)
class Finding:
    """The result for one type: what it supports, and the reason if not everything."""

    model_type: str
    exits: bool = False
    private_layers: bool = False
    relay: bool = False
    reason: str = ""

    def cells(self) -> list[str]:
        """Return a row of the table."""
        marks = ["yes" if x else "no" for x in (self.exits, self.private_layers, self.relay)]
        return [f"`{self.model_type}`", *marks, self.reason]


def try_type(model_type: str) -> Finding:
    """Build one type at tiny size and check it."""
    if model_type in UNRUNNABLE:
        return Finding(model_type, reason=UNRUNNABLE[model_type])
    host = tiny_model(model_type, num_hidden_layers=DEPTH)
    try:
        report = verify_backbone(host, depth=CUT)
    except ValueError as error:
        reason = str(error).split(": ", 1)[1].split(". ")[0]
        return Finding(model_type, reason=reason)
    reason = report.failure("logits", "taps", "steps", "segments", "relay")
    reason = reason.replace("ValueError: ", "").replace("\n", " ")
    if report.ok:
        check_family(host, private=report.continues)
    return Finding(model_type, report.ok, report.continues, report.relays, reason)


def check_family(host: transformers.PreTrainedModel, private: bool) -> None:
    """Check that the deepest exit equals the original model, in logits and in generated text."""
    ids = torch.randint(8, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    limits = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        logits = host(input_ids=ids, use_cache=False).logits
        text = host.generate(ids, use_cache=False, **limits)
        family = FamilialForCausalLM.from_backbone(
            host, exits=[1, CUT, DEPTH], num_exit_layers=int(private)
        )
        assert torch.equal(family(ids, use_cache=False).logits, logits), host.config.model_type
        assert torch.equal(family.generate(ids, **limits), text), host.config.model_type
        for exit_idx in range(3):
            family.generate(ids, exit_idx=exit_idx, **limits)


def main() -> int:
    """Try all types, and write the page or compare it with the file."""
    check = wants_check(__doc__)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    findings = [try_type(t) for t in causal_lm_types() if t != "familial"]
    works = {f.model_type for f in findings if f.exits}
    text = HEADER.format(
        version=transformers.__version__,
        depth=DEPTH,
        cut=CUT,
        total=len(findings),
        works=len(works),
    )
    head = ["type", "exits", "private layers", "relay", "reason"]
    text += table(head, [finding.cells() for finding in findings]) + "\n"
    relays, private = (sum(getattr(f, a) for f in findings) for a in ("relay", "private_layers"))
    print(
        f"{len(findings)} types: {len(works)} have exits, {private} private layers, {relays} relay"
    )
    for name, types in (("missing from", works - VERIFIED), ("wrongly in", VERIFIED - works)):
        if types:
            print(f"{name} VERIFIED: {sorted(types)}")
    if check:
        return int(works != VERIFIED or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return int(works != VERIFIED)


if __name__ == "__main__":
    sys.exit(main())
