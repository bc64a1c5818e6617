"""SGLang adapters: the only code in this distribution that imports ``sglang``."""
