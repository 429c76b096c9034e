# What setup.sh and people need to know.

output "bucket" {
  description = "For datasets and runs: DDPM_BUCKET."
  value       = local.runs
}

output "data_bucket" {
  description = "For archives and other originals, which jobs only read."
  value       = "gs://${google_storage_bucket.data.name}"
}

output "image" {
  description = "Where the image is pushed to and pulled from."
  value       = local.image
}

output "cluster" {
  description = "Name and zone of the cluster; empty without one."
  value       = var.gke ? "${local.cluster.name} ${local.cluster.location}" : ""
}

output "kubernetes_account" {
  description = "Namespace and service account of jobs, for `kubectl apply -f -`."
  value = templatefile("${path.module}/service-account.yaml.tftpl", {
    namespace   = var.name
    job_account = local.job
  })
}

output "targets" {
  description = "The text of targets.yaml."
  value = templatefile("${path.module}/targets.yaml.tftpl", {
    project       = var.project
    region        = var.region
    zones         = join(", ", local.zones)
    image         = local.image
    bucket        = local.runs
    job_account   = local.job
    network       = google_compute_network.this.id
    subnetwork    = google_compute_subnetwork.this.id
    machine_type  = var.gpu_pool.machine_type
    gpu_type      = var.gpu_pool.gpu_type
    gpus          = var.gpu_pool.gpus
    gke           = var.gke
    context       = var.gke ? "gke_${var.project}_${local.cluster.location}_${local.cluster.name}" : ""
    namespace     = var.name
    grace_seconds = var.long_shutdown ? 105 : 15
  })
  precondition {
    condition     = length(local.zones) > 0
    error_message = "No zone of ${var.region} has machines of type ${var.gpu_pool.machine_type}: choose another region or gpu_pool."
  }
}
