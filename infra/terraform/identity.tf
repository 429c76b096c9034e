# Who may do what. Jobs run as one account on every engine; it reaches two buckets, one image repository and the logs.

resource "google_service_account" "job" { account_id = "${var.name}-job" }

resource "google_storage_bucket_iam_member" "job_writes_runs" {
  bucket = google_storage_bucket.runs.name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member
}

resource "google_storage_bucket_iam_member" "job_reads_data" {
  bucket = google_storage_bucket.data.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.job.member
}

resource "google_artifact_registry_repository_iam_member" "pull" {
  for_each   = merge({ job = google_service_account.job.member }, { for account in google_service_account.nodes : "nodes" => account.member })
  repository = google_artifact_registry_repository.images.name
  location   = google_artifact_registry_repository.images.location
  role       = "roles/artifactregistry.reader"
  member     = each.value
}

resource "google_project_iam_member" "job" {
  # agentReporter: how a task on Google Batch says that it lives.
  for_each = toset(["roles/logging.logWriter", "roles/batch.agentReporter"])
  project  = var.project
  role     = each.value
  member   = google_service_account.job.member
}

# A VM deletes itself when its job is over. IAM conditions cannot see labels, but they see names, which begin with a verb.
locals {
  is_job = join(" || ", [for verb in ["train", "sample", "evaluate", "pack", "index", "encode"] : "resource.name.extract('/instances/{name}').startsWith('${verb}-')"])
}

resource "google_project_iam_custom_role" "deletes_itself" {
  role_id     = "${replace(var.name, "-", "_")}_deletes_itself"
  title       = "A VM of a ddpm job deletes itself"
  permissions = ["compute.instances.delete"]
}

resource "google_project_iam_member" "job_deletes_itself" {
  project = var.project
  role    = google_project_iam_custom_role.deletes_itself.name
  member  = google_service_account.job.member
  condition {
    title      = "VMs of ddpm jobs"
    expression = "resource.type == 'compute.googleapis.com/Instance' && (${local.is_job})"
  }
}

# Pods with the Kubernetes service account named ddpm act as the job account, without a key.
resource "google_service_account_iam_member" "pods_act_as_job" {
  count              = var.gke ? 1 : 0
  service_account_id = google_service_account.job.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${local.cluster.workload_identity_config[0].workload_pool}[${var.name}/ddpm]"
}

# Nodes pull images and report their health. What pods may do is not theirs.
resource "google_service_account" "nodes" {
  count      = var.gke ? 1 : 0
  account_id = "${var.name}-nodes"
}

resource "google_project_iam_member" "nodes" {
  count   = var.gke ? 1 : 0
  project = var.project
  role    = "roles/container.defaultNodeServiceAccount"
  member  = google_service_account.nodes[0].member
}
