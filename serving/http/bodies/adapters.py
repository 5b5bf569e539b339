"""The bodies of the two routes that load and unload adapters."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class LoadAdapterBody(BaseModel):
    """The body of POST /v1/load_lora_adapter. `lora_path` is a folder on the server in PEFT's format."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: Annotated[str, Field(min_length=1)]
    base_model_name: str | None = None


class UnloadAdapterBody(BaseModel):
    """The body of POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
