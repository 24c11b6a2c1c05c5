"""A process that has transformers and not this package: loads folders, writes their logits.

python stock_client.py ANSWERS FOLDER...
"""

import json
import sys


sys.modules["hf_familial"] = None  # as if it were not installed

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


IDS = torch.randint(8, 120, (2, 20), generator=torch.Generator().manual_seed(1))


def answer(folder):
    """What a stock client finds: class, keys that do not fit, logits."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, use_cache=False).logits
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    return {"class": type(model).__name__, "wrong": wrong, "logits": logits}


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        import hf_familial  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("the package could be imported")
    answers = {folder: answer(folder) for folder in json.loads(open(sys.argv[2]).read())}
    torch.save(answers, sys.argv[1])
