# What a person chooses: write it into terraform.tfvars, beside this file. setup.sh passes project, region and gke.

variable "project" {
  description = "ID of the Google Cloud project, which has billing enabled."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "A project's ID has 6 to 30 lower-case letters, digits and hyphens; it is neither its number nor its title."
  }
}

variable "region" {
  description = "Where buckets, images and machines are: within one region traffic between them is free."
  type        = string
  default     = "us-central1"
  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "Use the name of a region, such as us-central1; a zone such as us-central1-a is none."
  }
}

variable "zones" {
  description = "Zones of the region, in the order in which they are tried. Empty: all that have such machines."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for zone in var.zones : can(regex("^${var.region}-[a-z]$", zone))])
    error_message = "Each zone must lie in the region, such as us-central1-a in us-central1."
  }
}

variable "name" {
  description = "What the names of all that is made begin with: two set-ups in one project need two."
  type        = string
  default     = "ddpm"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,10}[a-z0-9]$", var.name))
    error_message = "Use 3 to 12 lower-case letters, digits and hyphens, beginning with a letter."
  }
}

variable "nat" {
  description = "Whether machines reach the internet: Batch's GPU drivers and the images of JobSet and Kueue come from there."
  type        = bool
  default     = true
}

variable "gke" {
  description = "Whether to make a cluster. One small node of it runs day and night; all others while jobs run."
  type        = bool
  default     = false
}

variable "gpu_pool" {
  description = "Machines with GPUs: their type, how many GPUs each has, and the most nodes of either kind in the cluster."
  type = object({
    gpu_type            = optional(string, "nvidia-l4")
    gpus                = optional(number, 1)
    machine_type        = optional(string, "g2-standard-8")
    disk_gigabytes      = optional(number, 150)
    spot_max_nodes      = optional(number, 4)
    on_demand_max_nodes = optional(number, 0)
  })
  default = {}
  validation {
    condition = anytrue([for gpu_type, family in {
      nvidia-l4         = "g2-"
      nvidia-tesla-a100 = "a2-highgpu-"
      nvidia-a100-80gb  = "a2-ultragpu-"
      nvidia-h100-80gb  = "a3-highgpu-"
      nvidia-tesla-t4   = "n1-"
    } : gpu_type == var.gpu_pool.gpu_type && startswith(var.gpu_pool.machine_type, family)])
    error_message = "These do not go together: nvidia-l4 is in g2-…, nvidia-tesla-a100 in a2-highgpu-…, nvidia-a100-80gb in a2-ultragpu-…, nvidia-h100-80gb in a3-highgpu-…; nvidia-tesla-t4 goes with n1-…."
  }
  validation {
    condition     = min(var.gpu_pool.spot_max_nodes, var.gpu_pool.on_demand_max_nodes) >= 0 && var.gpu_pool.spot_max_nodes + var.gpu_pool.on_demand_max_nodes <= 64 && contains([1, 2, 4, 8], var.gpu_pool.gpus) && var.gpu_pool.disk_gigabytes >= 130
    error_message = "Use 0 to 64 nodes in all, 1, 2, 4 or 8 GPUs, and 130 GB of disk at least: of less GKE leaves no 60 GB to a job."
  }
}

variable "long_shutdown" {
  description = "Whether spot nodes give jobs 105 s to save instead of 15. Needs a control plane of 1.35.0-gke.1171000 or later."
  type        = bool
  default     = true
}

variable "billing_account" {
  description = "For the budget alert: the ID that `gcloud billing accounts list` shows. Empty: no alert."
  type        = string
  default     = ""
  validation {
    condition     = can(regex("^([0-9A-F]{6}-[0-9A-F]{6}-[0-9A-F]{6})?$", var.billing_account))
    error_message = "A billing account's ID looks like 012345-6789AB-CDEF01."
  }
}

variable "monthly_budget" {
  description = "What a month may cost before billing administrators get mail, in the account's currency. It stops nothing."
  type        = number
  default     = 100
  validation {
    condition     = var.monthly_budget >= 1 && floor(var.monthly_budget) == var.monthly_budget
    error_message = "Use a whole number, at least 1."
  }
}
