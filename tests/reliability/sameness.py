"""What must be equal of two runs of which one was killed and started again."""

import json
import struct

from wandb.proto import wandb_internal_pb2 as wandb_file

from tests.trained import assert_equal, final_weights, last_checkpoint, metrics

STAGES = ("autoencoder", "diffusion")
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "ldm_lab")  # of a checkpoint; the rest are counters


def assert_same_run(run, reference):
    """Every stage that `reference` has is, in `run`, the same training with the same result: bit for bit, but times."""
    stages = [stage for stage in STAGES if (reference / stage).is_dir()]
    assert stages, f"{reference}: there is nothing to compare with"
    for stage in stages:
        ours, theirs = run / stage, reference / stage
        assert_equal(final_weights(ours), final_weights(theirs), stage)
        states = [last_checkpoint(folder) for folder in (ours, theirs)]
        for part in COMPARED:
            assert_equal(states[0][part], states[1][part], f"{stage}/{part}")
        assert_equal(*[timeless(metrics(folder)) for folder in (ours, theirs)], where=f"{stage}/metrics.csv")
        assert_equal(*[timeless(wandb_rows(folder)) for folder in (ours, theirs)], where=f"{stage}/wandb")
        assert_equal(*[json.loads((folder / "status.json").read_text()) for folder in (ours, theirs)], where=stage)
        assert_equal(*[pictures(folder) for folder in (ours, theirs)], where=f"{stage}/samples")
    assert not sorted(run.rglob(".*.tmp")), "what a killed process was writing is still there"
    assert_equal(*[published(folder) for folder in (run, reference)], where="pipeline")


def timeless(rows):
    """Rows of metrics without those of the clock."""
    return {n: {k: v for k, v in sorted(row.items()) if not k.startswith("perf/")} for n, row in sorted(rows.items())}


def pictures(stage_folder):
    """The PNG files of a stage by name."""
    return {path.name: path.read_bytes() for path in sorted((stage_folder / "samples").glob("*"))}


def published(run):
    """The files of the pipeline that a run is, by name."""
    paths = [p for p in sorted(run.rglob("*")) if p.is_file() and p.relative_to(run).parts[0] not in STAGES]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def wandb_rows(stage_folder):
    """The metrics in all offline files of a stage by images seen; of what is there twice the last."""
    rows = {}
    for path in sorted(stage_folder.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_file.Record()
            record.ParseFromString(data)
            found = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            values = {key: json.loads(value) for key, value in found.items() if not key.startswith(("_", "pictures/"))}
            if "images_seen" in values and len(values) > 1:  # more than its axis: pictures are not logged twice
                rows.setdefault(int(values["images_seen"]), {}).update(values)
    return rows


def wandb_records(data):
    """The whole records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    block, header = 32768, struct.Struct("<IHB")  # checksum, length, kind: whole, first, middle, last
    place, record = 7, b""
    while place + header.size <= len(data):
        left = block - place % block
        _, length, kind = header.unpack_from(data, place) if left >= header.size else (0, 0, 0)
        if kind == 0:  # padding
            place += left
            continue
        record += data[place + header.size : place + header.size + length]
        place += header.size + length
        if kind in (1, 4) and place <= len(data):
            yield record
            record = b""
