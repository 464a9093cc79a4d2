//! The settings that trainers leave beside a model.

use std::fs;

use ultramem::checkpoint::Settings;

use super::{file, fixture};

#[test]
fn olmo_leaves_its_settings_beside_the_model() {
    for path in ["olmo_ultramem_v2_sharded", "olmo_ultramem_v2_sharded/model.safetensors.index.json"] {
        let Some(Settings::Olmo(settings)) = Settings::find(fixture(path)).unwrap() else { panic!("not OLMo's") };
        assert_eq!((settings.d_model, settings.n_layers), (64, 4));
        assert_eq!((settings.layer_norm_type.as_deref(), settings.layer_norm_eps), (Some("rms"), Some(1e-5)));
        assert_eq!(
            (settings.mem_type.as_deref(), settings.mem_insert_way.as_deref()),
            (Some("ultramem_v2"), Some("full"))
        );
        assert_eq!((settings.mem_knum, settings.mem_kdim, settings.mem_vdim), (Some(8), Some(16), Some(24)));
        assert_eq!((settings.mem_knn, settings.mem_head, settings.mem_pre_vdim), (Some(8), Some(2), Some(16)));
        assert_eq!((settings.mem_share_ratio, settings.mem_tucker_rank_penalty), (Some(0.5), Some(0.001)));
        assert_eq!((settings.mem_key_expand_time, settings.mem_value_expand_time), (Some(2), Some(1)));
        assert_eq!((settings.mem_q_for_each_tucker_rank, settings.mem_use_glu_act), (Some(true), Some(false)));
    }
    let Some(Settings::Olmo(settings)) = Settings::find(fixture("olmo_ultramem_v1/model.pt")).unwrap() else {
        panic!("not OLMo's")
    };
    assert_eq!(settings.mem_insert_way.as_deref(), Some("1:2/2:3"));
}

#[test]
fn lingua_leaves_its_settings_beside_the_model() {
    let Some(Settings::Lingua(settings)) = Settings::find(fixture("lingua_memory_plus")).unwrap() else {
        panic!("not lingua's")
    };
    assert_eq!((settings.dim, settings.n_layers), (48, 4));
    let memory = settings.productkey_args.unwrap();
    assert_eq!((memory.is_enabled, memory.layers.as_deref()), (Some(true), Some("1,3")));
    assert_eq!((memory.mem_n_keys, memory.mem_heads, memory.mem_knn), (Some(18), Some(2), Some(6)));
    assert_eq!((memory.mem_k_dim, memory.mem_v_dim, memory.mem_share_values), (Some(24), Some(-1), Some(true)));
    assert_eq!(
        (memory.swilu_projection, memory.mem_gated, memory.peer_variant),
        (Some(true), Some(false), Some(false))
    );
}

#[test]
fn settings_are_known_by_what_they_hold() {
    for (name, text) in [
        ("a.json", r#"{"dim": 8, "n_layers": 2, "productkey_args": {"layers": "2"}}"#),
        (
            "a.json",
            r#"{"steps": 9, "model": {"dim": 8, "n_layers": 2, "productkey_args": {"layers": "2"}, "other": []}}"#,
        ),
        ("a.yaml", "steps: 9\nmodel:\n  dim: 8\n  n_layers: 2\n  productkey_args:\n    layers: 2\n"),
    ] {
        let (_folder, path) = file(name, text);
        let Settings::Lingua(settings) = Settings::read(path).unwrap() else { panic!("{text}") };
        assert_eq!((settings.dim, settings.productkey_args.unwrap().layers.as_deref()), (8, Some("2")));
    }
    for (name, text) in
        [("a.json", r#"{"d_model": 8, "n_layers": 2}"#), ("a.yml", "d_model: 8\nn_layers: 2\nmem_knum: null\n")]
    {
        let (_folder, path) = file(name, text);
        let Settings::Olmo(settings) = Settings::read(path).unwrap() else { panic!("{text}") };
        assert_eq!((settings.d_model, settings.mem_knum), (8, None));
    }
}

#[test]
fn settings_that_can_not_be_used_say_why() {
    let neither = "holds no settings of a model of OLMo (d_model) or lingua (dim): ";
    let bomb: String =
        (1..40).map(|i| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", "))).collect();
    for (name, text, message) in [
        ("a.json", "{}".into(), format!("{neither}missing field `model` at line 1 column 2")),
        ("a.json", r#"{"model": {}}"#.into(), format!("{neither}neither is there, nor under model")),
        ("a.json", r#"{"d_model": -1, "n_layers": 2}"#.into(), "invalid value: integer `-1`, expected usize".into()),
        ("a.json", r#"{"d_model": 1}"#.into(), "missing field `n_layers`".into()),
        ("a.json", "[".repeat(100_000), "EOF while parsing a list at line 1 column 100000".into()),
        ("a.json", r#"{"model":"#.repeat(100_000), "EOF while parsing a value at line 1 column 900000".into()),
        ("a.yaml", "[".repeat(100_000), "recursion limit exceeded at line 1, column 256".into()),
        ("a.yaml", "a:\n  ".to_string() + &"- ".repeat(100_000), "budget breached".into()),
        ("a.yaml", format!("a0: &a0 [x]\n{bomb}d_model: 8\nn_layers: 2\n"), "budget breached: Nodes".into()),
        ("a.yaml", "d_model: eight\nn_layers: 2\n".into(), "invalid u64 at line 1, column 10".into()),
    ] {
        let (_folder, path) = file(name, &text);
        let found = Settings::read(&path).unwrap_err().to_string();

        assert!(found.contains(&message) && !found.contains('\n'), "{found}");
    }
}

#[test]
fn one_file_of_settings_is_found() {
    let (folder, path) = file("params.json", r#"{"dim": 8, "n_layers": 2}"#);
    assert!(matches!(Settings::find(folder.path().join("model.pt")), Ok(Some(Settings::Lingua(_)))));
    fs::write(folder.path().join("config.yaml"), "d_model: 8").unwrap();
    let found = Settings::find(folder.path()).unwrap_err().to_string();
    assert!(found.ends_with("holds config.yaml and params.json: name one"), "{found}");
    fs::remove_file(path).unwrap();
    fs::remove_file(folder.path().join("config.yaml")).unwrap();
    assert_eq!(Settings::find(folder.path()).unwrap(), None);
    assert!(Settings::read(folder.path().join("a.json")).is_err());
}
