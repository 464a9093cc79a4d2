//! Texts that are no kernels: each an error that says where and what, whatever is wrong.

use crate::{ParseError, Program};

/// A kernel with a line before it, a line in it at line 8, and parameters.
fn kernel(before: &str, parameters: &str, line: &str) -> String {
    format!(
        "{before}\n.version 8.7\n.target sm_90a\n.visible .entry test({parameters})\n{{\n.reg .b32 %r<4>;\n.reg .pred %p<2>;\n\
         {line}\nret;\n}}\n"
    )
}

#[test]
fn unknown_instructions_are_named() {
    for (line, name) in [
        ("frobnicate.b32 %r0, %r1;", "frobnicate.b32 with 2 operands"),
        ("add.u31 %r0, %r1, %r2;", "add.u31 with 3 operands"),
        ("add.u32 %r0, %r1;", "add.u32 with 2 operands"),
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned with 0 operands"),
        ("@%p0 call.uni helper, (%r0);", "call.uni with 2 operands"),
        ("mov.u32 %r0, %r9;", "mov.u32 with 2 operands"),
    ] {
        let wanted = ParseError::Unknown { line: 8, instruction: name.to_owned() };
        assert_eq!(Program::parse(&kernel("", "", line)).unwrap_err(), wanted);
        assert_eq!(wanted.to_string(), format!("line 8 of the PTX: the instruction {name} is not known"));
    }
    // Of two the first.
    let text = kernel("", "", "first.b32 %r0;\nsecond.b32 %r0;");
    assert!(matches!(Program::parse(&text), Err(ParseError::Unknown { line: 8, .. })));
}

#[test]
fn broken_lines_are_errors_of_syntax() {
    for line in [
        "@%r0 add.u32 %r0, %r1, %r2;",
        "@%p7 add.u32 %r0, %r1, %r2;",
        "@%p0;",
        "@",
        "@!",
        "ld.global.u32 %r0, [%r9];",
        "ld.global.u32 %r0, [%r1+x];",
        "ld.global.u32 %r0, [];",
        "ld.global.u32 %r0, [+];",
        "ld.global.u32 %r0, [%r1+%r2];",
        "st.global.v2.u32 [%r0], {{%r0, %r1}};",
        "st.global.v2.u32 [%r0], {[%r0], %r1};",
        "setp.eq.u32 %p0|%p9, %r0, %r1;",
        "setp.eq.u32 %p0|%r0, %r0, %r1;",
        "setp.eq.u32 |, %r0, %r1;",
        "and.pred %p0, %p1, !%r0;",
        "and.pred %p0, %p1, !;",
        ".reg .b32;",
        ".reg .b31 %x;",
        ".reg .b32 %x<2;",
        ".reg .b32 %x<two>;",
        ".reg .b32 %x<-1>;",
        ".reg .b32 %x<99999999999>;",
        ".reg .b32 %x<4000000000>;",
        ".reg .pred %q<1000000>;",
        ".reg .b64 %x<200000>, %y<200000>;",
        ".reg .b32 ;",
        ".reg .b32 5;",
        ".branchtargets A, B;",
        "A: add.u32 %r0, %r1, %r2;\n.branchtargets A;",
        "A:\nA:\nret;",
        "}\nadd.u32 %r0, %r1, %r2;\n{",
        "}}",
        "{",
        "{{{{{{{{",
        "}\n.entry again()\n{",
        "}\n.func helper()\n{",
    ] {
        let found = Program::parse(&kernel("", "", line));
        let Err(ParseError::Syntax { line: at, reason }) = found else { panic!("{line}: {found:?}") };
        assert!(at >= 8 && !reason.is_empty(), "{line}: {at} {reason}");
    }
}

#[test]
fn broken_declarations_are_errors_of_syntax() {
    for line in [
        ".shared .align 4 .b8 x[99999999999];",
        ".shared .align 4 .b8 x[99999999999999999999999];",
        ".shared .b64 x[2305843009213693952];",
        ".shared .b32 x[-1];",
        ".shared .b32 x[two];",
        ".shared .b32 x[4;",
        ".shared .b32 x[2][2];",
        ".shared .b32 4x;",
        ".shared .b32 ;",
        ".shared x;",
        ".shared .b32 x y;",
        ".shared .b128 x;",
        ".shared .align 3 .b32 x;",
        ".shared .align 0 .b32 x;",
        ".shared .align .b32 x;",
        ".shared .b32 x; .shared .b32 y;",
        ".shared .b32 x",
        ".extern .shared .align 4294967296 .b8 x[];\n.shared .b8 y;",
        ".local .align 8 .b8 x[600000];",
        ".const .align 8 .b8 x[99999999999];",
        ".global .align 8 .b8 x[67108865];",
        ".global .align 4 .b32 x[2] = {1, 2, 3};",
        ".global .align 4 .b32 x = {1, 2};",
        ".global .align 4 .b32 x[2] = {1, y};",
        ".global .align 4 .b32 x[4] = {1,\n2, 3};",
        ".global .align 4 .f32 x = 1.5;",
    ] {
        let found = Program::parse(&kernel(line, "", "ret;"));
        let Err(ParseError::Syntax { line: at, .. }) = found else { panic!("{line}: {found:?}") };
        assert!((1..=2).contains(&at), "{line}: {at}");
    }
    // Each alone has room, all together have not.
    let many = ".shared .b8 x[200000];\n".to_owned();
    assert!(Program::parse(&kernel(&many, "", "ret;")).is_ok());
    let twice = many.clone() + &many.replace('x', "y");
    assert!(matches!(Program::parse(&kernel(&twice, "", "ret;")), Err(ParseError::Syntax { line: 2, .. })));
}

#[test]
fn broken_parameters_are_errors_of_syntax() {
    for parameters in [
        "x",
        ".param x",
        ".param .u64",
        ".param .b8 x[]",
        ".param .b8 x[99999999999]",
        ".param .b8 x[30000], .param .b8 y[30000]",
        ".param .align 5 .b8 x[4]",
        ".param .u64 .ptr .align x",
        ".param .u65 x",
    ] {
        let found = Program::parse(&kernel("", parameters, "ret;"));
        assert!(matches!(found, Err(ParseError::Syntax { .. })), "{parameters}: {found:?}");
    }
}

#[test]
fn texts_without_a_kernel_are_errors_of_syntax() {
    for text in [
        "",
        "\n\n",
        "// nothing",
        ".version 8.7\n",
        "ret;",
        "{ ret; }",
        ".entry {\nret;\n}",
        ".entry (){\nret;\n}",
        ".entry 5()\n{ret;}",
        "é",
        ";;;",
        "}",
        ".",
    ] {
        let found = Program::parse(text);
        assert!(matches!(found, Err(ParseError::Syntax { .. })), "{text:?}: {found:?}");
    }
    // Vectors in vectors are no deeper than the text is wide.
    let deep = kernel("", "", &format!("mov.b64 %r0, {};", "{".repeat(200_000)));
    assert!(Program::parse(&deep).is_err());
    let closed = kernel("", "", &format!("mov.b64 %r0, {}{};", "{".repeat(100_000), "}".repeat(100_000)));
    assert!(Program::parse(&closed).is_err());
}

/// A kernel without parameters, without a body, without line breaks, with comments.
#[test]
fn kernels_that_are_unusual_are_read() {
    for (text, instructions) in [
        (".entry a()\n{\n}\n", 0),
        (".entry a\n{\nret;\n}\n", 1),
        (
            ".visible .entry a ( .param .u64 p ) .maxntid 32, 1, 1 { .reg .b64 %x; ld.param.u64 %x, [p]; { exit; } ret; }",
            3,
        ),
        ("// .entry no(\n.entry a() // {\n{ // }\nret; // trap;\n}\n", 1),
        (
            ".entry a() {\nadd.u32\n  x,\n  x,\n  x;\n.reg .b32 y;\nret;\n}\n"
                .replace("{\nadd", "{\n.reg .b32 x;\nadd")
                .as_str(),
            2,
        ),
        (".entry a()\n{\nret;\n}\n.section .debug\n{\n.b8 1\n}\nrubbish", 1),
        (".entry a()\n{\n.reg .b32 %r<3>, x;\n{ .reg .b32 x; mov.u32 x, 1; }\nmov.u32 x, %r2;\n}", 2),
    ] {
        let found = Program::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!((found.entry.as_str(), found.code.len()), ("a", instructions), "{text}");
    }
}

/// A name in an inner scope is another register.
#[test]
fn scopes_have_registers_of_their_own() {
    let body = ".reg .b32 x;\nmov.u32 x, 3;\n{\n.reg .b32 x;\nmov.u32 x, 4;\n}\ncvt.u64.u32 %rd0, x;";
    assert_eq!(crate::testing::longs(crate::testing::WARP, body), [3; 32]);
}

/// Lines of the source are those of the first file; of code from elsewhere, where it was inlined.
#[test]
fn lines_of_the_source() {
    let text = kernel(
        ".file 1 \"kernel.cu\"\n.file 2 \"other.h\"",
        "",
        "mov.u32 %r0, 1;\n.loc 1 12 3\nmov.u32 %r0, 2;\n.loc 2 99 1\nmov.u32 %r0, 3;\n\
         .loc 2 99 1, function_name $L__info_string0, inlined_at 1 14 7\nmov.u32 %r0, 4;\n\
         .loc 1 15 1, function_name $L__info_string0, inlined_at 2 7 7\nmov.u32 %r0, 5;",
    );
    let lines: Vec<u32> = Program::parse(&text).unwrap().code.iter().map(|it| it.line).collect();
    assert_eq!(lines, [0, 12, 12, 14, 15, 15]);
}
