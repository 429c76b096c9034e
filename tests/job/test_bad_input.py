"""What people type and hand over by mistake, or on purpose: one line says what, where and what to do, and nothing
half-made is left that a later command would take for whole.
"""

from __future__ import annotations

from job.exits import Exit
from tests.job.command_line import ddpm, ddpm_here, ran, refused, refuses
from tests.job.some_images import files_in, folder_of, png

# What is typed, the exit code, and what the line says: these parts, in this order.
MEANINGLESS = [
    ("train", 2, "Missing option '--dataset'"),
    ("train --dataset a --dataste b", 2, "No such option … --dataste … --dataset"),
    ("train --dataset a/b", 64, "'a/b' … dataset's name … lower-case letters"),
    ("train --dataset a --run ../a", 64, "'../a' … run's name"),
    ("train --dataset a --preset landscap", 64, "'landscap' … did you mean 'landscape'?"),
    ("train --dataset a --resume", 2, "--resume (Possible options: --run NAME: the same command resumes that run)"),
    ("train --dataset a --batch-size=8", 2, "--set train.batch_size=VALUE"),
    ("train --dataset a --channels --lr", 2, "--set data.channels=VALUE, --set model.channels=VALUE)"),
    ("train --dataset a --output_dir out", 2, "--output_dir (Possible options: --bucket)"),
    ("train --dataset a --num_train_epochs 3", 2, "--num_train_epochs (Possible options: --epochs)"),
    ("sample --run a --seed 3", 2, "--seed (Possible options: … --seeds)"),
    ("sample --run a --batch_size 8", 2, "--batch_size (Possible options: --batch-size)"),
    ("runs show --resume a", 2, "Error: No such option: --resume"),
    ("train --dataset a --every", 2, "Error: No such option: --every"),
    ("submit train --dataset a --gpus 8 --lr 3", 2, "--lr (Possible options: --set train.learning_rate=VALUE)"),
    ("train --dataset a --set train.seed 3", 2, "Got unexpected extra argument"),
    ("sample celeba --steps 10", 2, "Error: Missing option '--run'"),
    ("trian", 2, "No such command 'trian'. Did you mean 'train'?"),
    ("runs lst", 2, "No such command 'lst'. Did you mean 'list'?"),
    ("import a.pt", 2, "Error: Missing option '--run'"),
    ("sample --run a --sampler DPM++", 64, "--sampler 'DPM++' … did you mean 'dpmpp_2m'?"),
    ("sample --run a --sampler plms", 64, "--sampler 'plms' … 'ddpm', 'ddim'"),
    ("sample --run a --sampler own", 64, "--sampler 'own' … module:function"),
    ("sample --run a --sampler ../mine:walk", 64, "--sampler '../mine:walk' … module:function"),
    ("sample --run a --precision fp8", 64, "--precision 'fp8' … 'bf16' or 'fp16'"),
    ("sample --run a --seeds 3-1", 64, "--seeds '3-1' … such as 0-63"),
    ("sample --run a --seeds 99999999999999999999", 64, "--seeds '99999999999999999999' … of up to 18 digits"),
    ("sample --run a --seeds 0-99999", 64, "--seeds … at most 10,000"),
    ("sample --run a --checkpoints newest", 64, "--checkpoints 'newest' … 30,80,490; or latest, or all"),
    ("ema --run a --std 0.1 --checkpoints newest", 64, "--checkpoints 'newest' … 30,80,490; or latest, or all"),
    ("export --run a --to x --checkpoint newest", 64, "--checkpoint 'newest' … such as 80, or latest"),
    ("data pack x a", 64, "--size is needed … try --size 64"),
    ("data ensure landscape-sample --source x", 64, "'landscape-sample' has its own images … (make: DATASET=NAME)"),
    ("submit pack x landscape-sample", 64, "has its own images: give yours another name"),
    ("data pack x a --size 96x64.5", 2, "'--size': 96x64.5: write 64 for a square, or width x height such as 96x64"),
    ("data show a --size 64x0", 2, "'--size': 64x0: sides have 1 to 4,096 pixels"),
    ("data pack x celeba --size 96x64", 64, "not of the shape of 96x64: use center, or 25,57,128,85"),
    ("data pack x a --size 8 --crop middle", 64, "--crop 'middle' … center"),
    ("data pack x a --size 8 --filter cubic", 64, "'cubic' … lanczos, bicubic"),
    ("data pack x a --size 8 --channels 17", 64, "17 channels … 3 for colour, 1 for grey"),
    ("data show a -o sheet.jpg", 64, "sheet.jpg … ends in .png"),
    ("figure noising --dataset a --schedule sine", 64, "--schedule 'sine' … linear, scaled_linear"),
    ("figure noising --dataset a --timesteps 1000", 64, "1000 is not in 0 to 999"),
    ("figure noising --dataset a -o nowhere/n.png", 64, "nowhere/n.png … a folder that is there"),
    ("sample --run a --weights mean", 64, "--weights 'mean': input should be 'ema', 'model' … such as 'ema-0.05'"),
    (f"train --dataset a --set data.size=0x{'f' * 5000}", 78, "data.size=0xfff … not valid YAML"),
    ("train --dataset a --config alias.yaml", 78, "alias.yaml … aliases are not supported"),
    ("train --dataset a --config deep.yaml", 78, "deep.yaml … exceeded maximum nesting depth"),
    ("train --dataset a --config bad.yaml", 78, "bad.yaml … 'trian.epochs' … did you mean 'train.epochs'?"),
    ("train --dataset a --config notes.yaml", 78, "notes.yaml … mapping of sections"),
    ("train --dataset a --config nowhere.yaml", 66, "nowhere … No such file"),
    ("sample --run a --seeds 1,,2", 64, "--seeds '1,,2' … numbers and ranges"),
    ("train --dataset a --config binary.yaml", 78, "binary.yaml is not valid YAML"),
    ("train --dataset a --config /dev/zero", 78, "/dev/zero is larger than 256 KiB: is it the right file?"),
    ("sample --run a --count 25600001", 2, "'--count' … less than or equal to 25600000"),
    ("sample --run a --count 5 --save jpg", 64, "--save 'jpg' … shards, png"),
    ("sample --run a --count 5 --slice 2/2", 64, "--slice '2/2' … from 0 to n-1"),
    ("sample --run a --first-seed 0", 64, "--first-seed … works only with --count: add the number"),
    ("sample --run a --count 5 --seeds 0-4", 64, "--seeds makes pictures … --count, which takes --first-seed"),
]
SETTINGS = [
    ("data.size=96by64 data.crop_scale=0,1 data.cache_gigabytes=1e300 model.patch_size=4 train.batch_size=-8 "
     "train.learning_rate=.nan train.seed=99999999999999999999 ema.stds=0.5 sample.sampler=euler_a "
     "sample.weights=0.05 sample.images=10001",
     "data.size: write 64 for a square, or width x height such as 96x64 (got '96by64') … data.crop_scale.0 … "
     "greater than 0 … cache_gigabytes … equal to 1000000000 … '1e300' … model.patch_size: not an option of "
     "model.kind=unet (got 4) … train.batch_size … greater than … got -8 … train.learning_rate … finite … "
     "train.seed … less than 9223372036854775808 … ema.stds.0 … less than or equal to 0.28 … did you mean "
     "'euler_ancestral'? (got 'euler_a') … sample.weights … such as 'ema-0.05' (got 0.05) … sample.images … 10000"),
    ("data.size=64x5000 diffusion.sigma_min=90 train.learning_rate_decay=cosine train.decay_images=0 "
     "ema.stds=0.05,0.050",
     "data.size: sides have 1 to 4,096 pixels (got '64x5000') … sigma_min=90 … below sigma_max=80 … decay_images "
     "above train.warmup_images … ema.stds has the same value twice"),
    ("data.size=[96,64] diffusion.schedule=edm diffusion.zero_terminal_snr=on train.decay_images=0 "
     "train.learning_rate_decay=inverse_root ema.snapshot_epochs=1",
     "data.size: write 64 for a square … rescales betas … needs a train.decay_images above 0 … ema.stds: set "
     "these, for example to 0.05,0.10"),
    ("train.batchsize=8", "'train.batchsize' … did you mean 'train.batch_size'?"),
    ("train.batch_size", "'train.batch_size' … key=value"),
    ("train.seed=[", "'train.seed=[' … not valid YAML"),
    ("data.crop_scale=1,0.8 model.kind=vit diffusion.schedule=flow diffusion.prediction=epsilon",
     "data.crop_scale=(1.0, 0.8) … smaller share comes first … one of unet, edm2, dit, dome … 'vit' … from pure noise"),
    ("model.kind=dit model.channels=64 diffusion.schedule=cosine diffusion.zero_terminal_snr=on",
     "model.channels … model.kind=dit … draws=log_normal exceeds … use draws=uniform"),
    ("data.size=96x66", "data.size=96x66 cannot be halved 2 times … multiple of 4"),
    ("model.kind=dome data.size=96x64", "model.kind=dome takes squares alone, not data.size=96x64: choose another"),
    ("data.size=33", "data.size=33 … multiple of 4 … fewer levels"),
    ("data.size=32 model.norm_groups=7", "model.channels=32 … groups=7"),
    ("model.channels=5 model.norm_groups=1", "model.channels=5 must be even"),
    ("model.patchsize=4", "'model.patchsize' … did you mean 'model.patch_size'?"),
    ("model.kind=dit model.heads=5", "model.width=384 cannot … model.heads=5"),
    ("model.kind=dit model.width=30", "model.width=30 … multiple of 4"),
    ("model.kind=dit model.heads=64 model.rope=on", "model.rope … model.width=384 … model.heads=64"),
    ("model.kind=dit data.size=33", "data.size=33 … model.patch_size=2"),
    ("model.kind=dome data.size=28", "data.size=28 … multiple of 8"),
    ("model.kind=dome diffusion.self_conditioning=on", "model.kind=dome … diffusion.self_conditioning"),
    ("model.kind=dome data.augment=0.1", "model.kind=dome … data.augment"),
    ("model.kind=edm2", "model.kind=edm2 needs … diffusion.schedule=edm"),
    ("model.heads=3", "64 channels … model.heads=3"),
    ("data.size=16 model.head_channels=12", "32 channels … head_channels=12"),
    ("sample.grid=leading sample.steps=400", "t=798 of 1000 … use steps that divide it"),
    ("preset=celeba", "preset … --preset NAME"),
    ("data.order=feistel-1", "data.order is set by the program"),
    ("quite.something.else=1", "sections: data, model"),
    ("train.seed=2020-99-99", "not valid YAML"),
    ("diffusion.objective=consistency diffusion.self_conditioning=on",
     "diffusion.objective=consistency compares estimates of the image alone: not self_conditioning=true"),
    ("consistency.guidance=2",
     "consistency.guidance=2 needs diffusion.objective=consistency, and --from a run that began with"),
    ("train.shard_optimizer=on", "train.shard_optimizer=true needs … slots … set train.exact=true"),
    ("sample.steps=5000", "sample.steps=5000 … diffusion.timesteps=1000"),
]  # fmt: skip
UNFIT = [
    ("train --dataset other", 66, "dataset 'other' is not in {bucket} yet. Get a folder or archive"),
    ("train --dataset tiles --run walk --set data.size=32", 66, "'tiles' at 32 pixels … there is tiles-16"),
    ("train --dataset tiles --run walk --set data.size=24x16", 66, "'tiles' at 24x16 pixels … there is tiles-16"),
    ("train --dataset tiles --run walk --set train.seed=1", 78, "train.seed: the run has 0, asked for 1 … --run"),
    ("train --dataset tiles --run walk --set train.learning_rate=1", 78, "NAME (with these weights: --from walk)"),
    ("train --dataset tiles --run walk --set model.dropout=0.5", 78, "another run with --run NAME, or"),
    ("data pack landscape-sample new --size 8 --min-side 999", 65,
     "under --min-side=999 … : pass a smaller --size or --min-side, or allow more with --max-bad"),
    ("train --dataset tiles --run new --processes 3 --set train.batch_size=2", 78,
     "3 processes cannot share train.batch_size=2 … --processes N"),
    ("train --dataset tiles --run new --set data.channels=1", 78, "data.channels is 1 … tiles-16 has 3"),
    ("train --dataset tile", 66, "'tile' is not in {bucket} yet; did you mean 'tiles'? Get a folder"),
    ("train --dataset celeb", 66, "did you mean 'celeba'? Get"),
    ("train --dataset fashion-mnits", 66, "did you mean 'fashion-mnist'? Get"),
    ("data show tiles-16", 66, "tiles-16 is dataset 'tiles' at 16 pixels: type tiles, and --size 16 (of ddpm train"),
    ("data pack {bucket}/runs new --size 9 --labels l", 66, "nothing at l: a column of the source itself is :l"),
    ("data pack {bucket}/runs new --size 99 --labels no/l.csv", 66, "--labels: there is nothing at no/l.csv"),
    ("data pack {bucket}/runs new --size 8 --labels :label", 64, "has a label 'label': a table is FILE:COLUMN"),
    ("train --dataset tiles --run new --set model.num_classes=4", 78, "num_classes is 4 … tiles-16 has 5"),
    ("train --dataset other --run walk", 64, "run 'walk' … has the dataset 'tiles'"),
    ("sample --run other", 66, "no run 'other' … ddpm runs list"),
    ("sample --run walk --checkpoints 1,7", 66, "no checkpoint of epoch 7 … there are: 1, 3)"),
    ("train --dataset tiles --run new --set sample.weights=ema-0.05", 78, "ema-0.05: training has only ema, model"),
    ("sample --run walk --weights ema-0.05", 66, "no weights ema-0.05 (it has ema, ema-0.1) … walk --std 0.05"),
    ("ema --run walk --std 0.05 --checkpoints 7", 66, "no checkpoint of epoch 7"),
    ("sample --run walk --steps 51", 78, "sample.steps=51 exceeds diffusion.timesteps=50"),
    ("train --dataset tiles --run new --set diffusion.objective=consistency --set model.label_dropout=0.1 --set "
     "consistency.guidance=2", 78, "consistency.guidance=2 needs a parent: type --from RUN"),
    ("data verify tiles --size 8", 66, "'tiles' at 8 pixels … there is tiles-16"),
    ("data pack landscape-sample tiles --size 16", 64, "tiles-16 is there already … 299 images"),
    ("data pack {bucket}/nothing.zip new --size 8", 66, "nothing at … nothing.zip … folder or an archive"),
    ("runs show nobody", 66, "there is no run 'nobody' in {bucket}:"),
    ("submit train --dataset tiles --on mars", 64, "unknown target 'mars' … local"),
]  # fmt: skip


def check(rows, bucket):
    before = bucket.exists(), files_in(bucket)
    for words, code, parts in rows:
        refuses([(words.format(bucket=bucket), code, parts.format(bucket=bucket))], DDPM_BUCKET=str(bucket))
        assert (bucket.exists(), files_in(bucket)) == before, words


def test_a_request_that_means_nothing(tmp_path, monkeypatch):
    """It is refused before anybody looks for the bucket, which is not there."""
    written = [("bad", b"trian:\n  epochs: 3\n"), ("notes", b"- buy milk\n"), ("deep", b"[" * 5000)]
    written += [("alias", b"train: &loop\n  epochs: *loop\n"), ("binary", b"\xff\xfe")]
    folder_of(tmp_path, [(f"{name}.yaml", content) for name, content in written])
    monkeypatch.chdir(tmp_path)
    rows = [(f"train --dataset a --set {keys.replace(' ', ' --set ')}", 78, parts) for keys, parts in SETTINGS]
    check(MEANINGLESS + rows, tmp_path / "nowhere")


def test_a_working_folder_that_is_gone(bucket, tmp_path, monkeypatch):
    """Libraries would fail in it, and relative paths lead nowhere."""
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    words = (f"runs list --bucket {bucket}", f"sample --run walk --bucket {bucket}", "data pack x y", "jobs list")
    refuses((each, Exit.MISSING_INPUT, "the working folder is gone") for each in words)


def test_unfit_requests_change_nothing(bucket):
    check(UNFIT, bucket)
    before = files_in(bucket)
    line = refused(ddpm("sample", "--run", "walk", "--bucket", bucket, DDPM_GPUS="1"), Exit.MISSING_INPUT)
    assert "this job was given 1 GPU, and PyTorch sees 0: this machine lacks the NVIDIA driver" in line
    assert files_in(bucket) == before


def test_another_size_is_another_run(bucket):
    """Beside a dataset of the run's size that has other images now."""
    place, train = ("--bucket", bucket), "train --dataset tiles --run walk"
    said = "run 'walk' learns tiles at 16 pixels, not 8: type --run walk-8 (make: RUN=walk-8)"
    ran("data", "pack", "landscape-sample", "tiles", "--size", 8, *place)
    assert refused(ddpm_here(*train.split(), "--set", "data.size=8", *place), Exit.BAD_CONFIG) == f"ddpm: {said}"
    ran("data", "delete", "tiles", "--size", 16, "--yes", *place)
    ran("data", "pack", "landscape-sample", "tiles", "--size", 16, "--filter", "box", *place)
    refuses([(train, Exit.BAD_CONFIG, "but the dataset tiles-16 has")], *place)


TO_GET = """\
ddpm: dataset 'celeba' is not in b yet. Get img_align_celeba.zip from the CelebA project page, then type
  make submit-train DATASET=celeba SOURCE=path/to/it SIZE=64 BUCKET=b
or, to pack alone,
  ddpm data pack path/to/it celeba --size 64 --bucket b
"""


def test_a_missing_source_says_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ddpm_here("data", "ensure", "celeba", "--bucket", "b")
    assert (done.returncode, done.stderr) == (Exit.MISSING_INPUT, TO_GET)
    assert not list(tmp_path.iterdir())
    # Training says the same, of the size that its network takes, and of images that need no search.
    for words, typed in (
        ("celeba", "data pack path/to/it celeba --size 64"),
        ("mine --preset dit", "data pack path/to/it mine --size 64"),
        ("mine --set data.size=48", "data pack path/to/it mine --size 48"),
        ("landscape-sample", "data ensure landscape-sample"),
    ):
        done = ddpm_here("train", "--dataset", *words.split(), "--bucket", "b")
        refused(done, Exit.MISSING_INPUT)
        assert done.stderr.endswith(f"\n  ddpm {typed} --bucket b\n")


def test_an_unfinished_dataset_is_listed(tmp_path):
    left, damaged, place = "datasets/mine-16/pieces/00000.json", "datasets/other-16/index.json", ("--bucket", tmp_path)
    folder_of(tmp_path, [(left, b"{ : "), (damaged, b"{ : ")])
    listed = ran("data", "list", *place)
    assert "unfinished: pack it again, or delete it" in listed and "index.json is corrupt" in listed
    refuses([("data show other", Exit.BAD_DATA, f"{tmp_path}/{damaged}")], *place)
    ran("data", "delete", "mine", "--yes", *place)
    assert not (tmp_path / left).exists()


def test_datasets_come_and_go(tmp_path):
    """Packing leaves out the bucket, and only `--yes` deletes."""
    folder_of(tmp_path, [(f"{number}.png", png(number)) for number in range(12)])
    bucket, size = tmp_path / "bucket", ("--size", 8)
    words = (*size, "--bucket", bucket)
    ran("data", "pack", tmp_path, "one", *words)
    ran("data", "show", "one", *words)
    assert list(bucket.rglob("*.png"))
    assert "images   12 colour" in ran("data", "pack", tmp_path, "two", *words)
    here = ("data", "pack", tmp_path, "three", *size, "--bucket", tmp_path)
    refuses([(here, Exit.BAD_REQUEST, "is both SOURCE and bucket")])
    for name in ("one", "two"):
        ran("data", "delete", name, *words, "--yes")
    assert files_in(bucket) == {}
    pack, delete = ("data", "pack", tmp_path, "mine"), ("data", "delete", "mine")
    refuses([(delete, Exit.MISSING_INPUT, "no dataset")], *words)
    ran(*pack, *words)
    there = files_in(bucket)
    refuses([(pack, Exit.BAD_REQUEST, "is there already"), (delete, Exit.BAD_REQUEST, "add --yes")], *words)
    assert files_in(bucket) == there
    assert "deleted" in ran(*delete, *words, "--yes")
    ran(*pack, *words)
    assert files_in(bucket) == there
