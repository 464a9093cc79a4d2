use cubecl::Runtime;
use ultramem::*;
use ultramem_offline::*;
#[test]
fn dump() {
    let device = OfflineDevice::new(Options { execution: Execution::Skipped, ..Options::default() });
    let client = OfflineRuntime::client(&device);
    for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        let config = MemoryConfig::new(Dimensions::default()).unwrap();
        let weights = Weights::random(&config, 1);
        let layer = MemoryLayer::new(&client, config.clone(), &weights, dtype).unwrap();
        for tokens in [1, 16, 128] {
            let input = layer.upload(&vec![0.5; tokens * config.hidden_size]).unwrap();
            println!("{:?}", layer.strategies(tokens));
            layer.forward(&input).unwrap();
            for r in device.take_reports() {
                println!("{} {} {:?} {:?} {} {} {:?}", r.kernel.name, r.kernel.entry, r.kernel.dim, r.count, r.kernel.shared, r.kernel.info, r.kernel.buffers.iter().map(|b| b.element.clone()).collect::<Vec<_>>());
                std::fs::write(format!("/tmp/src/{}-{dtype}-{tokens}.cu", r.kernel.entry), r.kernel.source).unwrap();
            }
        }
    }
}
