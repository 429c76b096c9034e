# Machines without addresses of their own: buckets, images and logs are reached through private Google access.

resource "google_compute_network" "this" {
  name                    = var.name
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "this" {
  name                     = var.name
  region                   = var.region
  network                  = google_compute_network.this.id
  ip_cidr_range            = "10.10.0.0/20"
  private_ip_google_access = true
  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = "10.20.0.0/16"
  }
  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = "10.30.0.0/20"
  }
}

resource "google_compute_router" "this" {
  count   = var.nat ? 1 : 0
  name    = var.name
  region  = var.region
  network = google_compute_network.this.id
}

resource "google_compute_router_nat" "this" {
  count                              = var.nat ? 1 : 0
  name                               = var.name
  region                             = var.region
  router                             = google_compute_router.this[0].name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"
}

# A node pool that names a zone without such machines is refused whole, so they are asked for first.
data "google_compute_zones" "up" { region = var.region }

data "google_compute_machine_types" "gpu" {
  for_each = toset(data.google_compute_zones.up.names)
  zone     = each.value
  filter   = "name = \"${var.gpu_pool.machine_type}\""
}

locals {
  with_gpu = sort([for zone, gpu in data.google_compute_machine_types.gpu : zone if length(gpu.machine_types) > 0])
  zones    = length(var.zones) > 0 ? var.zones : local.with_gpu
}
