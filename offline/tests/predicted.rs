//! No kernel of a layer is predicted to take a tenth longer than docs/kernels.md says: who makes one slower writes its table anew, and sees it.

use ultramem_offline::profile::predictions::{grown, rows, table};

#[test]
fn no_kernel_has_grown_by_a_tenth() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kernels.md")).unwrap();
    let rows = rows().unwrap();
    let grown = grown(&page, &rows);
    assert!(
        grown.is_empty(),
        "docs/kernels.md: {grown:#?}\nIf that is meant, write the table anew with `ultramem kernels --predictions`:\n{}",
        table(&rows)
    );
}
