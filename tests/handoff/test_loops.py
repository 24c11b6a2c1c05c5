"""Both ends of a split over a channel of bytes."""

import queue
import threading

import pytest
import torch
from parted import NEW, family_and_device, padded_text, whole

from hf_familial.errors import HandoffError
from hf_familial.handoff import DeviceSide, run_device, run_server, server_side
from hf_familial.handoff.loops import decode_tokens, encode_tokens


def test_two_processes_over_a_channel():
    family, device = family_and_device("qwen3")
    ids, mask = padded_text()
    up, down, texts = queue.Queue(), queue.Queue(), []
    deep = server_side(family, 0, keep_lower=False)
    server = threading.Thread(target=lambda: texts.append(run_server(deep, down.put, up.get)))
    server.start()
    text = DeviceSide(device).start(ids, mask, max_new_tokens=NEW)
    found = run_device(text, up.put, lambda: down.get(timeout=60), dtype="fp32")
    server.join()
    assert torch.equal(found, whole(family, ids, mask))
    assert torch.equal(texts[0].tokens, found)


def test_the_message_with_tokens():
    tokens = torch.tensor([[5], [7]])
    payload = encode_tokens(tokens, done=True)
    found, done = decode_tokens(payload, 2)
    assert torch.equal(found, tokens)
    assert done is True
    with pytest.raises(HandoffError, match="one token for each of 3 rows"):
        decode_tokens(payload, 3)
    with pytest.raises(HandoffError, match="checksum"):
        decode_tokens(payload[:-1] + b"\1", 2)
    family, device = family_and_device("llama")
    state = DeviceSide(device).start(tokens.T).state("split")
    with pytest.raises(HandoffError, match="must contain `tokens` and `done` only"):
        decode_tokens(state.to_bytes(), 1)
