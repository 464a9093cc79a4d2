/// a
pub struct Architecture; 
/// a
pub struct Compiled;
/// a
pub fn compile(){}
/// a
pub fn ptx(){}
