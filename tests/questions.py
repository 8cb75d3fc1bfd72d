"""For the tests of question answering: files as SQuAD has them, and a folder of weights in the Hugging Face layout."""

import gzip
import json
from pathlib import Path

import torch
from running import TINY, composed, to_config

from luqrun.config import Config
from luqrun.internals.of_transformers import transformers
from luqrun.tasks.question_answering import wordpiece

NORMANS = "The Normans gave their name to Normandy, a région in France. Rollo was their leader."
RIVERS = "The Rhine rises in Switzerland; it is 1,230 km long."


def question(name, text, *answers, context=NORMANS) -> dict:
    """answers: texts; each stands where the context has it first."""
    found = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": name, "question": text, "answers": found}


def squad(*paragraphs) -> dict:
    """paragraphs: (context, questions)."""
    shown = [{"context": context, "qas": questions} for context, questions in paragraphs]
    return {"version": "1.1", "data": [{"title": "Title", "paragraphs": shown}]}


def sample() -> dict:
    normans = [
        question("n1", "What did the Normans name?", "Normandy", "a région in France"),
        question("n2", "Who led them?", "Rollo"),
    ]
    rivers = [
        question("r1", "Where does the Rhine rise?", "Switzerland", context=RIVERS),
        question("r2", "How long is the Rhine?", "1,230 km", context=RIVERS),
    ]
    return squad((NORMANS, normans), (RIVERS, rivers))


def write_squad(root: Path, train=None, val=None, compressed=False) -> Path:
    """ROOT with both files, of `sample` if they are not given."""
    root.mkdir(exist_ok=True)
    for name, content in (("train-v1.1.json", train), ("dev-v1.1.json", val)):
        stored = json.dumps(sample() if content is None else content, ensure_ascii=False, indent=1).encode()
        path = root / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(stored) if compressed else stored)
    return root


def config(root: Path | None, *overrides) -> Config:
    """A run on the files under `root`, or on a few generated facts."""
    data = ["dataset=squad", f"dataset.root={root}"] if root else ["dataset=facts", "dataset.examples=64"]
    return plain(*data, "model=bert_tiny", "schedule=facts", "schedule.warmup_epochs=0", *overrides)


def plain(*overrides) -> Config:
    """As running.tiny composes it, without its sizes of glyphs."""
    kept = [each for each in TINY if "glyphs" not in each]
    return to_config(composed(*kept, "dataset.batch_size=4", *overrides))


SIZES = {
    **{"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 96, "type_vocab_size": 2},
}


def write_weights(folder: Path, texts=(NORMANS, RIVERS), **changes) -> Path:
    """A small BERT with random weights and a tokenizer, as transformers saves them."""
    tokenizer = wordpiece.train(texts, 200)
    sizes = {**SIZES, "hidden_dropout_prob": 0.25, **changes}
    torch.manual_seed(5)
    model = transformers().BertModel(transformers().BertConfig(**sizes))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder
