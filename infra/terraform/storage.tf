# Two buckets and the images. `data` holds what people bring (archives, foreign tars), and jobs only read it; `runs` holds
# what jobs make, packed datasets too. Packing reads the one and writes the other, so no job can spoil an original.

resource "google_storage_bucket" "data" {
  name                        = "${var.project}-${var.name}-data"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  # An archive that somebody deletes by mistake can be had back for a week.
  soft_delete_policy { retention_duration_seconds = 604800 }
  lifecycle_rule {
    action { type = "AbortIncompleteMultipartUpload" }
    condition { age = 1 }
  }
}

resource "google_storage_bucket" "runs" {
  name                        = "${var.project}-${var.name}-runs"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  # Kept for a week more, each retired checkpoint would be paid for a week more: a thousand, at one in ten minutes.
  soft_delete_policy { retention_duration_seconds = 0 }
  # What checks of the bucket leave behind when their process is killed.
  lifecycle_rule {
    action { type = "Delete" }
    condition {
      age            = 1
      matches_prefix = ["doctor/", "probe/", "tmp/"]
    }
  }
  lifecycle_rule {
    action { type = "AbortIncompleteMultipartUpload" }
    condition { age = 1 }
  }
}

# A CUDA image has gigabytes: of old ones the five newest stay. Keeping wins over deleting.
resource "google_artifact_registry_repository" "images" {
  repository_id = var.name
  location      = var.region
  format        = "DOCKER"
  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"
    condition { older_than = "2592000s" }
  }
  cleanup_policies {
    id     = "keep-newest"
    action = "KEEP"
    most_recent_versions { keep_count = 5 }
  }
}
