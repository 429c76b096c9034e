from job.data.pack import PackRequest
from job.requests import TrainRequest, parse_numbers


def test_numbers_and_ranges():
    assert parse_numbers("0-3,7, 9-9", "--seeds") == [0, 1, 2, 3, 7, 9]


def test_a_training_request_is_checked_without_a_bucket():
    request = TrainRequest("my_photos.v2", "gs://nowhere", epochs=3).check()
    assert request.run == "my-photos-v2"
    assert request.changes == {"train.epochs": 3}
    assert request.preset_name == "landscape-sample"
    assert TrainRequest("celeba", "x").check().preset_name == "celeba"


def test_packing_follows_the_preset_of_the_name():
    request = PackRequest("x.zip", "celeba").check()
    assert (request.size, request.crop, request.resize_filter) == (64, "25,57,128,128", "bilinear")
    assert PackRequest("x.zip", "celeba", size=32, crop="squash").check().crop == "squash"
