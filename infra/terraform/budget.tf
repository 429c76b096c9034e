# Mail to the billing administrators when a month becomes dear. It stops nothing: the limits of jobs do (max_hours).

data "google_project" "this" { project_id = var.project }

resource "google_billing_budget" "this" {
  count           = var.billing_account == "" ? 0 : 1
  billing_account = var.billing_account
  display_name    = "${var.name} in ${var.project}"
  budget_filter { projects = ["projects/${data.google_project.this.number}"] }
  amount {
    specified_amount { units = tostring(var.monthly_budget) }
  }
  threshold_rules { threshold_percent = 0.5 }
  threshold_rules {
    threshold_percent = 1.0
    spend_basis       = "FORECASTED_SPEND" # sooner than the bill, which is a day late
  }
}
