"""The configuration of a run: its settings, their rules, and where their values come from.

A configuration is resolved once, when a run begins: preset ← dataset ← `--config FILE` ← `--set key=value`. It is then
stored with the run, and every later attempt starts from it. `schema` lists the settings.
"""

from ddpm.catalogue import LARGEST as LARGEST
from job.config.resolve import CHOSEN_ELSEWHERE as CHOSEN_ELSEWHERE
from job.config.resolve import EMBEDDED as EMBEDDED
from job.config.resolve import FOLLOWS as FOLLOWS
from job.config.resolve import FREE as FREE
from job.config.resolve import FREE_SECTIONS as FREE_SECTIONS
from job.config.resolve import PackConfig as PackConfig
from job.config.resolve import changed_for_attempt as changed_for_attempt
from job.config.resolve import description_of as description_of
from job.config.resolve import draft as draft
from job.config.resolve import known_keys as known_keys
from job.config.resolve import pack_config as pack_config
from job.config.resolve import parse_mapping as parse_mapping
from job.config.resolve import parse_sets as parse_sets
from job.config.resolve import parse_yaml as parse_yaml
from job.config.resolve import preset_names as preset_names
from job.config.resolve import read_config_file as read_config_file
from job.config.resolve import read_settings as read_settings
from job.config.run_config import RunConfig as RunConfig
from job.config.run_config import flatten as flatten
from job.config.run_config import layered as layered
from job.config.run_config import nearest_name as nearest_name
from job.config.run_config import validated as validated
from job.config.schema import NETWORKS as NETWORKS
from job.config.schema import CheckpointConfig as CheckpointConfig
from job.config.schema import DataConfig as DataConfig
from job.config.schema import SampleConfig as SampleConfig
from job.config.schema import SamplerConfig as SamplerConfig
from job.config.schema import Section as Section
from job.config.schema import Size as Size
from job.config.schema import average_name as average_name
from job.config.schema import image_size as image_size
