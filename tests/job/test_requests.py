import pytest

from job.data.pack import PackRequest
from job.exits import BadConfigError, BadRequestError, MissingInputError
from job.requests import SampleRequest, TrainRequest, parse_numbers


def test_numbers_and_ranges():
    assert parse_numbers("0-3,7, 9-9", "--seeds") == [0, 1, 2, 3, 7, 9]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-", "0-99999999999", "1;2"])
def test_bad_lists_name_the_option(text):
    with pytest.raises(BadRequestError, match="--seeds"):
        parse_numbers(text, "--seeds")


def test_a_training_request_is_checked_without_a_bucket():
    request = TrainRequest("my_photos.v2", "gs://nowhere", epochs=3).check()
    assert request.run == "my-photos-v2"
    assert request.changes == {"train.epochs": 3}
    assert request.preset_name == "landscape-sample"
    assert TrainRequest("celeba", "x").check().preset_name == "celeba"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (TrainRequest("a/b", "x"), BadRequestError),
        (TrainRequest("a", "x", run="a/b"), BadRequestError),
        (TrainRequest("a", "x", run="../b"), BadRequestError),
        (TrainRequest("a", "x", preset="nope"), BadRequestError),
        (TrainRequest("a", "x", sets=("x=1",)), BadConfigError),
        (SampleRequest("a/b", "x"), BadRequestError),
        (SampleRequest("a", "x", sampler="euler"), BadRequestError),
        (SampleRequest("a", "x", checkpoints="newest"), BadRequestError),
        (SampleRequest("a", "x", seeds="x"), BadRequestError),
        (SampleRequest("a", "x", precision="fp16"), BadRequestError),
        (SampleRequest("a", "x", seeds="0-12", gif=True, grid=False), BadRequestError),
        (PackRequest("x", "a/b", size=3), BadRequestError),
        (PackRequest("x", "Ä", size=3), BadRequestError),
        (PackRequest("x", "a"), BadRequestError),
        (PackRequest("x", "a", size=8, channels=4), BadRequestError),
        (PackRequest("x", "a", size=8, licence="\x1b[31mCC0"), BadRequestError),
    ],
)
def test_bad_requests(request_, error):
    with pytest.raises(error):
        request_.check()


def test_a_missing_config_file(tmp_path):
    with pytest.raises(MissingInputError):
        TrainRequest("a", "x", config_file=tmp_path / "no.yaml").check()


def test_packing_follows_the_preset_of_the_name():
    request = PackRequest("x.zip", "celeba").check()
    assert (request.size, request.crop, request.resize_filter) == (64, "25,57,128,128", "bilinear")
    assert PackRequest("x.zip", "celeba", size=32, crop="squash").check().crop == "squash"
