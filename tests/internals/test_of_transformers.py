"""transformers is loaded offline and quietly, and told of in one line where it is missing."""

import os
import subprocess
import sys

import pytest

from luqrun.errors import UserError
from luqrun.internals.of_transformers import PACKAGES, transformers

CODE = """
import os, logging
from luqrun.internals.of_transformers import transformers
assert "transformers" not in __import__("sys").modules
module = transformers()
from huggingface_hub import constants
assert constants.HF_HUB_OFFLINE
assert module.utils.logging.get_verbosity() == logging.ERROR
assert not module.utils.logging.is_progress_bar_enabled()
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
texts = ["one two three"] * 500
trainer = trainers.WordPieceTrainer(vocab_size=50, special_tokens=["[UNK]"], show_progress=False)
tokenizer.train_from_iterator(texts, trainer)
expected = [each.ids for each in tokenizer.encode_batch(texts)]
child = os.fork()
if child == 0:
    os._exit([each.ids for each in tokenizer.encode_batch(texts)] != expected)
assert os.waitpid(child, 0)[1] == 0
"""


def test_it_is_offline_and_quiet_and_a_forked_process_may_tokenize():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TOKENIZERS_"))}
    done = subprocess.run([sys.executable, "-c", CODE], env=clean, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_one_line_that_says_how_to_install_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^{name} not found.*pip install 'luqrun\[text\]'$"):
        transformers()
