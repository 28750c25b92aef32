__version__ = "0.1.0"

from medvlm3d.base import compat

compat.install()

PUBLIC = ("MedVLM3D", "MedVLM3DConfig", "MedVLM3DProcessor", "tiny", "demo", "paper")


def __getattr__(name):
    "The model's names, imported from `medvlm3d.method.model` when first used: a bare import stays cheap."
    if name not in PUBLIC:
        raise AttributeError(f"module 'medvlm3d' has no attribute {name!r}")
    from medvlm3d.method import model
    return getattr(model, name)


def __dir__():
    return sorted({*globals(), *PUBLIC})
