from job.data.reading.stream import crosses, epochs_completed_by, images_at_epoch


def test_epochs_end_at_batch_boundaries():
    ends = [images_at_epoch(*case) for case in ((1, 299, 8), (2, 299, 8), (8, 299, 8), (3, 5, 16))]
    assert ends == [304, 600, 8 * 299, 16]


def test_one_batch_completes_each_epoch():
    for dataset_images, batch_size in [(299, 8), (5, 16), (16, 4), (7, 7), (10, 3)]:
        assert not epochs_completed_by(0, dataset_images, batch_size)
        completed = [
            epoch
            for images in range(batch_size, 40 * dataset_images, batch_size)
            for epoch in epochs_completed_by(images, dataset_images, batch_size)
        ]
        assert completed == list(range(1, len(completed) + 1))
        for epoch in completed:
            boundary = images_at_epoch(epoch, dataset_images, batch_size)
            assert epoch in epochs_completed_by(boundary, dataset_images, batch_size)


def test_crosses_fires_once_per_multiple():
    fired = [images for images in range(8, 401, 8) if crosses(images, 8, 100)]
    assert fired == [104, 200, 304, 400]
