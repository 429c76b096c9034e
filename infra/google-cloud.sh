#!/usr/bin/env bash
# What setup.sh does on Google Cloud. It sources this file, and its variables and functions are used here:
# shellcheck disable=SC2154,SC2034 # project, region, name, scratch and the like are setup.sh's

check_account() {
  ((!dry_run)) || return 0
  [[ -n $(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) ]] ||
    fail 77 "gcloud has no account: gcloud auth login"
  gcloud auth application-default print-access-token >/dev/null 2>&1 ||
    fail 77 "Terraform and ddpm find no credentials: gcloud auth application-default login"
}

find_project() {
  if [[ -z $project ]] && ((!dry_run)); then
    project=$(gcloud config get-value project 2>/dev/null) || project=''
  fi
  [[ -n $project ]] || fail 2 "which project? Add --project ID (gcloud projects list shows those there are)"
}

terraform_here() { terraform -chdir="$terraform_folder" "$@"; }

# output NAME IN-A-DRY-RUN
output() {
  if ((dry_run)); then
    printf '%s' "$2"
  else
    terraform_here output -raw "$1" || fail $? "Terraform's state has no output $1: it was not applied to its end"
  fi
}

prepare_terraform() {
  local state=gs://$project-$name-terraform
  begin "looking for Terraform's state in $state"
  if ((dry_run)) || ! gcloud storage buckets describe "$state" --project "$project" >/dev/null 2>&1; then
    run gcloud storage buckets create "$state" --project "$project" --location "${region:-us-central1}" \
      --uniform-bucket-level-access --public-access-prevention
    run gcloud storage buckets update "$state" --versioning
  fi
  export TF_IN_AUTOMATION=1
  run terraform -chdir="$terraform_folder" init -input=false -reconfigure -backend-config="bucket=${state#gs://}"
}

# apply_plan WORDS…: plans, shows, asks, applies.
apply_plan() {
  local plan=$scratch/plan code=0 lost answer
  local -a words=(-chdir="$terraform_folder" plan -input=false -detailed-exitcode -out="$plan" -var="project=$project" -var="name=$name")
  [[ -z $region ]] || words+=(-var="region=$region")
  ((!gke)) || words+=(-var=gke=true)
  if ((dry_run)); then
    show terraform "${words[@]}" "$@"
    ((plan_only)) || show terraform -chdir="$terraform_folder" apply -input=false "$plan"
    return
  fi
  terraform "${words[@]}" "$@" || code=$?
  case $code in
    0) say "nothing to change" && return ;;
    2) ;;
    *) fail "$code" "$doing failed with code $code: nothing was changed" ;;
  esac
  ((!plan_only)) || return 0
  lost=$(terraform_here show -json "$plan" | python3 -c '
import json, sys
changes = json.load(sys.stdin).get("resource_changes", [])
print(", ".join(c["address"] for c in changes if "delete" in c["change"]["actions"]))')
  if [[ -n $lost ]] && ((!destroy && !allow_destroy)); then
    fail 64 "this would remove $lost. Nothing was changed. With --gke the cluster stays; add --allow-destroy if you mean it"
  fi
  if ((!yes)); then
    [[ -t 0 ]] || fail 64 "nobody can be asked here: look at the plan above, then add --yes. Nothing was changed"
    read -r -p "Apply this plan to project $project? [y/N] " answer
    [[ $answer == [yY]* ]] || fail 64 "nothing was changed"
  fi
  run terraform -chdir="$terraform_folder" apply -input=false "$plan"
}

make_infrastructure() {
  local -a services=(artifactregistry batch cloudresourcemanager compute iam iamcredentials logging storage)
  services+=(billingbudgets)
  ((!gke)) || services+=(container)
  begin "enabling the services of $project"
  run gcloud services enable "${services[@]/%/.googleapis.com}" --project "$project"
  prepare_terraform
  begin "making buckets, network, accounts and image repository"
  apply_plan
}

remove_infrastructure() {
  local address
  local -a targets=()
  if ((!dry_run)) && ! gcloud storage buckets describe "gs://$project-$name-terraform" --project "$project" >/dev/null 2>&1; then
    say "nothing is there: no set-up of the name $name has a state in $project"
    return
  fi
  prepare_terraform
  begin "removing all but the buckets"
  if ((dry_run)); then
    show terraform -chdir="$terraform_folder" state list
    targets=(-target=EACH-RESOURCE-BUT-THE-BUCKETS)
  else
    terraform_here state list >"$scratch/state" || fail $? "$doing failed: the state cannot be read"
    while IFS= read -r address; do
      case $address in
        google_storage_bucket.* | data.*) ;;
        *) targets+=("-target=$address") ;;
      esac
    done <"$scratch/state"
  fi
  if ((${#targets[@]})); then apply_plan -destroy "${targets[@]}"; else say "nothing is there"; fi
  say "What remains, and is paid for as storage, are the buckets. To delete them, with all runs and datasets, for good:"
  say "  gcloud storage rm --recursive gs://$project-$name-runs gs://$project-$name-data gs://$project-$name-terraform"
}

# Lets the cluster's pods act as the job account.
bind_cluster() {
  local cluster cluster_name zone
  cluster=$(output cluster "$( ((!gke)) || printf '%s ZONE' "$name")")
  [[ -n $cluster ]] || return 0
  read -r cluster_name zone <<<"$cluster"
  begin "telling kubectl and the cluster of each other"
  run gcloud container clusters get-credentials "$cluster_name" --location "$zone" --project "$project" --dns-endpoint
  output kubernetes_account '' >"$scratch/account.yaml"
  run kubectl --context "gke_${project}_${zone}_$cluster_name" apply -f "$scratch/account.yaml"
}

image_by_tag() { output image "${region:-us-central1}-docker.pkg.dev/$project/$name/ddpm:latest"; }

# The targets, whose jobs have one image for all their attempts: what the tag means now, if there is anything yet.
cloud_targets() {
  local text full digest=''
  text=$(output targets '') && full=$(image_by_tag) || return
  # podman's own record of it differs from what the registry has.
  ((dry_run)) || digest=$(gcloud artifacts docker images describe "$full" --format='value(image_summary.digest)' 2>/dev/null) || digest=''
  digest=${full%:*}@$digest
  [[ $digest != *@sha256:* ]] || text=${text//"$full"/$digest}
  printf '%s\n' "$text"
}

push_image() {
  local full
  ((image)) || return 0
  full=$(image_by_tag)
  begin "building and pushing $full"
  # A token on the standard input is in no list of processes.
  if ((dry_run)); then
    printf '+ gcloud auth print-access-token |'
    show "$engine" login --username oauth2accesstoken --password-stdin "https://${full%%/*}" | cut -c 2-
  else
    gcloud auth print-access-token | run "$engine" login --username oauth2accesstoken --password-stdin "https://${full%%/*}" ||
      fail $? "no way to push to ${full%%/*}"
  fi
  run make -C "$root" image push-image "IMAGE=$full" "ENGINE=$engine"
}
