fn main() {
    ultramem_cpu::probe::probe();
}
