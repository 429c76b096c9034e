"""The table of what lies where: what a key is made of is read out of it again."""

from job.runs.layout import CheckpointRef, Located, ObjectKind, located

READ = {
    "checkpoint": CheckpointRef(3, 480),
    "fence": 3,
    "group": "ema-0.13",
    "folder": "one",
    "piece": 12,
}
OTHERS = {
    "steps": 10,
    "pipeline": "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "number": 2,
    "name": "epoch-0001-ddim-4",
    "picture": "png",
    "seed": 3072,
    "unique": "d" * 32,
}


def test_a_key_is_read_back():
    for kind in ObjectKind:
        fields = {name: value for name, value in READ.items() if f"{{{name}" in kind.value}
        assert located(kind.key(**READ | OTHERS)) == Located(kind, **fields), kind
