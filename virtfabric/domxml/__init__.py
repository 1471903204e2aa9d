"""libvirt XML, pure: text <-> model, through `xml_templates/`. Adapters and shim both use it."""
