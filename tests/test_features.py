"""A feature store: two ranks write it and one dies, little memory reads it, hashes check it."""
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from processes import command, torchrun, two_ranks

from medvlm3d.data.samples import alias
from medvlm3d.base.core import MedVLM3DError, write_json
from medvlm3d.data.m3d import load_m3d, read_image, series_facts
from medvlm3d.method.encoders import load_encoder
from medvlm3d.features.encode import StoreSpec
from medvlm3d.features.store import FORMAT, FeatureStore, encode_images, write_shard
from medvlm3d.features.encode import encode_volume
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.base.lock import only_writer
from medvlm3d.scans.prepare import Preprocess

TYPED = ["--encoder", "tiny", "--depth", "8", "--size", "32", "--rho", "50", "--float32", "--quiet"]
KILLED = """
import os, signal, sys
import medvlm3d.features.store as features
from medvlm3d.base.ranks import or_one_line
count, encode_volume = 0, features.encode_volume
def dies(*args, **options):
    global count
    count += 1
    if count > 3 and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
    return encode_volume(*args, **options)
features.encode_volume = dies
from typer.main import get_command
from medvlm3d.front.cli import app
or_one_line(lambda: get_command(app).main(["features", *sys.argv[1:]], standalone_mode=False))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A phantom, and its store written by one process."
    root = tmp_path_factory.mktemp("corpus")
    make_phantom(root/"data", train=9, validation=2, test=2, shape=(8, 32, 32), workers=1, progress=False)
    images = list(dict.fromkeys(s.image for s in load_m3d(root/"data")))
    twin = next(image for image in images[1:] if series_facts(image)[0] == series_facts(images[0])[0])
    shutil.copy(root/"data"/images[0], root/"data"/twin)
    return root, images, command("features", root/"data", root/"alone", *TYPED)


def same(store, other, images):
    return all(torch.equal(a, b) for image in images for a, b in zip(store[image], other[image]))


def test_two_ranks_write_what_one_writes_though_one_of_them_is_killed(corpus, tmp_path):
    root, images, alone = corpus
    codes, said, apart = two_ranks(KILLED, root/"data", tmp_path/"store", "--shard-size", "2", *TYPED)
    assert codes == [1, -signal.SIGKILL] and "lost another rank" in said[0] and apart < 60, said[0]
    left = FeatureStore(tmp_path/"store", verify=True)
    kept = {file for file, _ in left.rows.values()}
    assert 2 <= len(left.rows) < 12 and same(left, alone, [i for i in images if i in left])
    done = torchrun(
        "medvlm3d", "features", root/"data", tmp_path/"store", "--shard-size", "2", *TYPED[:-1]
    )
    assert done.returncode == 0 and re.search(r"encode \(rank 0 of 2\): 100%.* volumes/s", done.stderr), (
        done.stderr
    )
    store = FeatureStore(tmp_path/"store", verify=True)
    assert len(store) == 13 and len(store.rows) == 12 and same(store, alone, images)
    cards = [json.loads(f.read_text()) for f in (tmp_path/"store").glob("shard-*.json")]
    assert sum(len(c["volumes"]) for c in cards) == 12 and kept <= {c["file"] for c in cards}
    assert not list((tmp_path/"store").glob(".*"))


def test_any_flipped_byte_of_a_shard_is_noticed_before_it_is_used(corpus, tmp_path):
    root, images, alone = corpus
    shutil.copytree(root/"alone", tmp_path/"store")
    shard = next((tmp_path/"store").glob("shard-*.safetensors"))
    whole = shard.read_bytes()
    refused = 0
    for at in [*range(0, 1200, 37), *range(1200, len(whole), len(whole) // 40)]:
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at+1:])
        with pytest.raises(MedVLM3DError, match="is damaged. Encode again") as error:
            FeatureStore(tmp_path/"store", verify=True)
        assert shard.name in error.value.what
        store = FeatureStore(tmp_path/"store")
        for image in images:
            try:
                pair = store[image]
            except MedVLM3DError as e:
                refused += shard.name in e.what and "is damaged" in e.why and "verify=True" in e.remedy
            else:
                assert all(torch.equal(a, b) for a, b in zip(pair, alone[image])), at
    assert refused >= 60


def test_what_a_killed_writer_left_does_not_count_and_is_removed(corpus, tmp_path):
    root, images, alone = corpus
    shutil.copytree(root/"alone", tmp_path/"store")
    for card in (tmp_path/"store").glob("shard-*.json"):
        card.unlink()  # killed between a shard and its card
    (tmp_path/"store"/".shard-0.safetensors.1.part").write_bytes(b"half")        # killed within a shard
    assert len(FeatureStore(tmp_path/"store")) == 0
    assert same(command("features", root/"data", tmp_path/"store", *TYPED), alone, images)
    assert not list((tmp_path/"store").glob(".*.part"))


def test_a_second_writer_and_other_settings_are_refused(corpus, tmp_path):
    root, images, _ = corpus
    message = "alone: is being written by another process.*Wait"
    with only_writer(root/"alone"), pytest.raises(MedVLM3DError, match=message):
        command("features", root/"data", root/"alone", *TYPED)
    others = {
        "--rho": ("25", "rho (50 → 25)"),
        "--strategy": ("uniform", "strategy (cosine → uniform)"),
        "--size": ("48", "preprocess.height (32 → 48)"),
    }
    for option, (value, told) in others.items():
        with pytest.raises(MedVLM3DError) as error:
            command("features", root/"data", root/"alone", *TYPED, option, value)
        assert (
            error.value.what.endswith("alone")
            and told in error.value.why
            and "new folder" in error.value.remedy
        )
    write_json(tmp_path/"old"/"store.json", {"encoder": "tiny"})
    message = r"old: has another form \(medvlm3d.features/1 → medvlm3d.features/3\). Encode into a new folder"
    with pytest.raises(MedVLM3DError, match=message):
        FeatureStore(tmp_path/"old")


def test_every_form_of_m3d_is_read(tmp_path):
    "A .npy, a .nii.gz and a folder of pictures, as M3D ships them, through `read=read_image`."
    import nibabel
    import numpy as np
    from PIL import Image
    folder, array = (
        tmp_path/"M3D_Cap"/"ct_case"/"000001",
        np.random.default_rng(0).random((10, 32, 32), np.float32),
    )
    folder.mkdir(parents=True)
    np.save(folder/"Axial_a.npy", array[None])
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder/"Sagittal_b.nii.gz")
    (folder/"Coronal_c").mkdir()
    for i, picture in enumerate(array):
        Image.fromarray((picture * 255).astype(np.uint8)).save(folder/"Coronal_c"/f"{i}.png")
    images = [f"M3D_Cap/ct_case/000001/{name}" for name in ("Axial_a.npy", "Sagittal_b.nii.gz", "Coronal_c")]
    encoder, preprocess = load_encoder("tiny", size=32), Preprocess(8, 32, 32, plane="axial")
    store = encode_images(
        tmp_path/"store",
        tmp_path,
        images=images,
        encoder=encoder,
        preprocess=preprocess,
        rho=50,
        progress=False,
        read=read_image,
    )
    for image in images:
        features, _ = encode_volume(read_image(tmp_path/image), encoder, preprocess=preprocess, rho=50)
        assert torch.equal(store[image][0], features)
    assert [store.key(image)[64:] for image in images] == [
        ":m3d:axial:CT",
        ":m3d:sagittal:CT",
        ":m3d:coronal:CT",
    ] and store.spec["reader"] == "read_image"


def test_what_the_reader_remarked_stays_with_the_features_and_is_counted(tmp_path, capfd):
    "Interleaved slices and a header that contradicts itself: kept with the volume and counted."
    import nibabel
    import numpy as np
    grid = np.linspace(0, 1, 16, dtype=np.float32)
    array = np.cos(np.add.outer(np.add.outer(3 * grid, grid), 2 * grid))
    for n in range(3): np.save(tmp_path/f"mixed{n}.npy", (array + n)[None][:, np.r_[0:16:2, 1:16:2]])
    np.save(tmp_path/"plain.npy", array[None])
    odd = nibabel.Nifti1Image(array, np.diag([2., 2, 2, 1]))
    odd.set_qform(np.diag([3., 3, 3, 1]), 1)
    nibabel.save(odd, tmp_path/"odd.nii.gz")
    images = ["mixed0.npy", "mixed1.npy", "mixed2.npy", "plain.npy", "odd.nii.gz"]
    made = encode_images(
        tmp_path/"store",
        tmp_path,
        images=images,
        encoder=load_encoder("tiny", size=32),
        preprocess=Preprocess(8, 32, 32),
        rho=50,
        shard_size=2,
    )
    said = capfd.readouterr().err
    assert ("3 volumes: the slices look interleaved: check their order\n" in said
            and "1 volume: qform and sform differ: the sform is used\n" in said and "mixed" not in said)
    for store in (made, FeatureStore(tmp_path/"store", verify=True)):
        assert (all("interleaved" in " ".join(store.notes(image)) for image in images[:3])
                and not any("interleaved" in note for note in store.notes("plain.npy")))
        assert (
            "qform and sform differ: the sform is used" in store.notes("odd.nii.gz")
            and store.notes("nowhere.npy") == ()
        )


READ_ALL = """
import sys
from medvlm3d.features.store import FeatureStore
def resident():
    sizes = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(sizes[0]) / 1e3
store = FeatureStore(sys.argv[1], most_open=int(sys.argv[2]))
images = [f"{key}.npy" for key in store.rows]
store[images[0]]
before = resident()
for image in images: store[image]
print(resident() - before)
"""


def test_memory_does_not_grow_with_the_store(tmp_path):
    "100 MB in twelve shards: two open maps hold two shards, twelve hold all."
    spec = StoreSpec.of(load_encoder("tiny"), Preprocess(8, 64, 64)).to_dict()
    write_json(tmp_path/"store.json", {"format": FORMAT, **spec})
    keys = [f"{i:064x}" for i in range(48)]
    for n in range(0, 48, 4):
        drawn = {key: (torch.randn(16, 64, 1024).bfloat16(), torch.arange(16)) for key in keys[n:n+4]}
        write_shard(tmp_path, drawn)
    write_json(
        tmp_path/"images.json",
        {alias(f"{key}.npy"): {"key": key, "stamp": "", "sha256": key} for key in keys},
    )
    def growth(n):
        command = [sys.executable, "-c", READ_ALL, tmp_path, str(n)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    few, all_open = growth(2), growth(12)
    assert few < 50 and all_open > 80, (few, all_open)
