# GKE, if asked for: one zonal control plane, one small node for the system, and nodes for jobs that exist while jobs run.

locals {
  scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
  max_nodes = { spot = var.gpu_pool.spot_max_nodes, on-demand = var.gpu_pool.on_demand_max_nodes }
  gpu_pools = { for capacity, nodes in local.max_nodes : "gpu-${capacity}" => { capacity = capacity, nodes = nodes, machine_type = var.gpu_pool.machine_type, gpus = [var.gpu_pool.gpus] } }
  # Who packs needs no GPU, and should pay for none.
  cpu_pools = { for capacity in keys(local.max_nodes) : "cpu-${capacity}" => { capacity = capacity, nodes = 4, machine_type = "e2-standard-8", gpus = [] } }
}

resource "google_container_cluster" "this" {
  count                    = var.gke ? 1 : 0
  name                     = var.name
  location                 = local.zones[0]
  network                  = google_compute_network.this.id
  subnetwork               = google_compute_subnetwork.this.id
  remove_default_node_pool = true
  initial_node_count       = 1
  datapath_provider        = "ADVANCED_DATAPATH"
  deletion_protection      = false # nothing in it that cannot be made again; `make infra-destroy` asks
  release_channel { channel = "REGULAR" }
  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }
  private_cluster_config { enable_private_nodes = true }
  # Reached by name and judged by IAM: no address of the control plane is open to anybody.
  control_plane_endpoints_config {
    dns_endpoint_config { allow_external_traffic = true }
    ip_endpoints_config { enabled = false }
  }
  workload_identity_config { workload_pool = "${var.project}.svc.id.goog" }
  # Of the default pool, until it is removed: projects without a default account could not begin otherwise.
  node_config { service_account = google_service_account.nodes[0].email }
  lifecycle { ignore_changes = [location, node_config] } # a new zone in the region must not make another cluster of this one
}

resource "google_container_node_pool" "system" {
  count          = var.gke ? 1 : 0
  name           = "system"
  cluster        = google_container_cluster.this[0].id
  node_locations = [google_container_cluster.this[0].location]
  autoscaling {
    total_min_node_count = 1
    total_max_node_count = 3
  }
  management {
    auto_repair  = true
    auto_upgrade = true
  }
  node_config {
    machine_type    = "e2-standard-2"
    service_account = google_service_account.nodes[0].email
    oauth_scopes    = local.scopes
    workload_metadata_config { mode = "GKE_METADATA" }
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }
}

resource "google_container_node_pool" "jobs" {
  for_each       = { for name, pool in merge(local.gpu_pools, local.cpu_pools) : name => pool if var.gke && pool.nodes > 0 }
  name           = each.key
  cluster        = google_container_cluster.this[0].id
  node_locations = local.zones
  depends_on     = [google_container_node_pool.system] # GKE taints GPU nodes only beside a pool without GPUs
  autoscaling {
    total_min_node_count = 0
    total_max_node_count = each.value.nodes
    location_policy      = "ANY" # an even spread would leave machines unfound
  }
  management {
    auto_repair  = true
    auto_upgrade = true
  }
  node_config {
    machine_type    = each.value.machine_type
    spot            = each.value.capacity == "spot"
    disk_size_gb    = var.gpu_pool.disk_gigabytes
    service_account = google_service_account.nodes[0].email
    oauth_scopes    = local.scopes
    labels          = { ddpm-capacity = each.value.capacity }
    dynamic "guest_accelerator" {
      for_each = each.value.gpus
      content {
        type  = var.gpu_pool.gpu_type
        count = guest_accelerator.value
        gpu_driver_installation_config { gpu_driver_version = "LATEST" }
      }
    }
    # GKE taints GPU nodes by itself. Pods of the system would keep the others from going.
    dynamic "taint" {
      for_each = each.key == "gpu-on-demand" ? [] : [each.value.capacity]
      content {
        key    = taint.value == "spot" ? "cloud.google.com/gke-spot" : "ddpm-capacity"
        value  = taint.value == "spot" ? "true" : taint.value
        effect = "NO_SCHEDULE"
      }
    }
    dynamic "kubelet_config" {
      for_each = each.value.capacity == "spot" && var.long_shutdown ? [120] : []
      content {
        shutdown_grace_period_seconds               = kubelet_config.value
        shutdown_grace_period_critical_pods_seconds = 15
      }
    }
    gcfs_config { enabled = true } # containers start before all of their image is there
    gvnic { enabled = true }
    workload_metadata_config { mode = "GKE_METADATA" }
    shielded_instance_config { enable_integrity_monitoring = true } # secure boot would refuse unsigned GPU drivers
  }
}
