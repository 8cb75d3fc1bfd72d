"""luqrun: 4-bit training, exact, from one command.

>>> recipe = luqrun.recipe("luq")
>>> model = luqrun.quantize_model(model, recipe)
"""

import importlib

__version__ = "0.1.0"
# Raised whenever the numbers of a run change with the code: a result of another one is never taken for this one's.
RESULTS = 2

# Imported on first use: `import luqrun` stays free of torch and everything heavier.
_HOMES = {
    "Recipe": "luqrun.quant.recipe",
    "recipe": "luqrun.recipes",
    "Quantizer": "luqrun.quant.quantizer",
    "quantizer": "luqrun.quant.quantizer",
    "QuantizedTensor": "luqrun.quant.quantizer",
    "quantize_model": "luqrun.quant.convert",
    "set_step": "luqrun.quant.convert",
    "set_finetune": "luqrun.quant.convert",
    "keep_memory": "luqrun.runtime.memory",
    "UserError": "luqrun.errors",
}
__all__ = [*_HOMES, "__version__"]


def __dir__():
    return sorted(__all__)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'luqrun' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
