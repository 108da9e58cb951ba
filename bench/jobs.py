"""Every job of the benchmark. Operations: op_jobs, loss_jobs, step_jobs; whole models: model_jobs."""

from __future__ import annotations

from loss_jobs import all_loss_jobs, mini_loss_jobs
from model_jobs import all_model_jobs, mini_model_jobs
from op_jobs import all_op_jobs, mini_op_jobs
from step_jobs import all_step_jobs, mini_step_jobs

JOBS = [*all_model_jobs(), *all_op_jobs(), *all_loss_jobs(), *all_step_jobs()]
MINI = [*mini_model_jobs(), *mini_op_jobs(), *mini_loss_jobs(), *mini_step_jobs()]  # each kind once, for tests
BY_KEY = {job.key: job for job in JOBS}
