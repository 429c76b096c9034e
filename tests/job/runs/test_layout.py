"""The table of what lies where: what a key is made of is read out of it again."""

from job.runs.layout import CheckpointRef, Located, ObjectKind, located

REF = CheckpointRef(3, 480)
GRID = "samples/one/grid.png"
ROWS = {
    ObjectKind.CONFIG: ("config.yaml", {}),
    ObjectKind.LEASE: ("lease.json", {}),
    ObjectKind.STATUS: ("status.json", {}),
    ObjectKind.LATEST: ("LATEST", {}),
    ObjectKind.PAGE: ("report.html", {}),
    ObjectKind.ATTEMPT: ("attempts/000003.json", {"fence": 3}),
    ObjectKind.MANIFEST: ("checkpoints/000003-000000000480/MANIFEST.json", {"checkpoint": REF}),
    ObjectKind.TENSORS: ("checkpoints/000003-000000000480/ema-00.safetensors", {"checkpoint": REF, "group": "ema"}),
    ObjectKind.PIPELINE: (
        "checkpoints/000003-000000000480/unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        {"checkpoint": REF},
    ),
    ObjectKind.AVERAGE: (
        "checkpoints/000003-000000000480/averages/ema-0.13.json",
        {"checkpoint": REF, "group": "ema-0.13"},
    ),
    ObjectKind.AVERAGE_TENSORS: (
        f"checkpoints/000003-000000000480/averages/{'d' * 32}/ema-0.13-02.safetensors",
        {"checkpoint": REF, "group": "ema-0.13"},
    ),
    ObjectKind.SNAPSHOT: (
        "snapshots/000003-000000000480/ema-0.05-00.safetensors",
        {"checkpoint": REF, "group": "ema-0.05"},
    ),
    ObjectKind.METRICS: ("metrics/000003-000000000480.jsonl", {"checkpoint": REF}),
    ObjectKind.EVENTS: ("tensorboard/events.out.tfevents.000003-000000000480", {"checkpoint": REF}),
    ObjectKind.GRID_EVENTS: ("tensorboard/samples/events.out.tfevents.000003-000000000480", {"checkpoint": REF}),
    ObjectKind.PICTURE: ("samples/epoch-0001-ddim-4.png", {}),
    ObjectKind.FIGURE: ("figures/loss.png", {}),
    ObjectKind.DRAWING: ("samples/one/drawing.json", {"batch": "one"}),
    ObjectKind.PIECE: ("samples/one/piece-00012.tar", {"batch": "one", "piece": 12}),
    ObjectKind.IMAGE: ("samples/one/piece-00012/000003072.png", {"batch": "one", "piece": 12}),
    ObjectKind.RECORD: ("samples/one/pieces/00012.json", {"batch": "one", "piece": 12}),
    ObjectKind.CLAIM: ("samples/one/claims/00012/lease.json", {"batch": "one", "piece": 12}),
    ObjectKind.FEATURE_RECORD: ("evaluations/one/pieces/00012.json", {"batch": "one", "piece": 12}),
    ObjectKind.FEATURE_CLAIM: ("evaluations/one/claims/00012/lease.json", {"batch": "one", "piece": 12}),
    ObjectKind.GRID: (GRID, {"batch": "one"}),
    ObjectKind.INDEX: ("samples/one/index.json", {"batch": "one"}),
    ObjectKind.PROVENANCE: (
        f"provenance/samples/one/grid.png/{'a' * 64}.json",
        {"of": "samples/one/grid.png", "sha256": "a" * 64},
    ),
    ObjectKind.FEATURES: ("evaluations/one/piece-00012.safetensors", {"batch": "one", "piece": 12}),
    ObjectKind.SCORES: ("evaluations/one/scores.json", {"batch": "one"}),
    ObjectKind.FOUND_GRID: ("grids/found-10.json", {"steps": 10}),
    ObjectKind.READER: (f"reading/000003-000000000480-{'b' * 32}.json", {"checkpoint": REF}),
    ObjectKind.PROBE: (f"probe/{'c' * 32}", {}),
}
MADE_OF = {
    "pipeline": "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "group": "ema",
    "number": 0,
    "name": "x",
    "picture": "png",
    "seed": 3072,
    "unique": "d" * 32,
}


def test_every_kind_has_a_key_that_is_read_back():
    assert ROWS.keys() == {*ObjectKind}
    for kind, (key, fields) in ROWS.items():
        assert located(key) == Located(kind, **fields), key
        made = kind.key(**MADE_OF | fields)
        assert located(made) == Located(kind, **fields), made
