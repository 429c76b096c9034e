# What this is written for: the tests compare it with the schema of provider 8.7.

terraform {
  required_version = ">= 1.9, < 2.0" # 1.9 is the first whose validations may look at other variables
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 8.7, < 9.0"
    }
  }
  # setup.sh names the bucket (-backend-config): two people who set up one project must share a state.
  backend "gcs" { prefix = "terraform" }
}

provider "google" {
  project        = var.project
  region         = var.region
  default_labels = local.labels
  # The API of budgets belongs to no project and asks for one to count requests against.
  user_project_override = true
  billing_project       = var.project
}

locals {
  labels  = { app = "ddpm" }
  job     = google_service_account.job.email
  runs    = "gs://${google_storage_bucket.runs.name}"
  image   = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}/ddpm:latest"
  cluster = one(google_container_cluster.this[*])
}
