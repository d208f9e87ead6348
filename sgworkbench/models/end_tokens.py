"""Which tokens end the model's turn."""

from __future__ import annotations

import json

from sgworkbench.models.identity import LoadedModel


def end_token_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return every id that ends generation: generation_config.json's (or config.json's) and the tokenizer's.

    Chat models often have several, and the files do not always agree; stopping at any of them is what users expect.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = loaded.folder / name
        if path.is_file():
            stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ids += stated if isinstance(stated, list) else [] if stated is None else [stated]
            if ids:
                break
    if loaded.tokenizer.eos_token_id is not None:
        ids.append(int(loaded.tokenizer.eos_token_id))
    return tuple(dict.fromkeys(int(token) for token in ids))
