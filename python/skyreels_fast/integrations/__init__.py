"""Our ops under other projects' models; each module here needs that project, and imports it when first used."""
